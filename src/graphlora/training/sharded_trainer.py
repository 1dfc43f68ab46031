"""The part of the trainer that knows FSDP2: sharded base, whole adapter, checkpoints as those of one process."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from typing import Any, cast

import torch
from torch import Tensor, nn
from transformers import Trainer

from graphlora.training.sharding import average_gradients, free_gathered, in_lockstep, shard_base
from graphlora.tuner.config import GraphLoraConfig


class ShardedTrainer(Trainer):
    """`Trainer` that shards the base alone where accelerate is configured for FSDP2, and else changes nothing."""

    def train(self, *args: Any, **kwargs: Any) -> Any:
        """Train; the base is sharded before, or DDP told whether to look for parameters without a gradient."""
        if self.is_fsdp_enabled:
            shard_base(self.accelerator, cast(nn.Module, self.model))
        elif self.args.ddp_find_unused_parameters is None and _trains_all(self.model):
            self.args.ddp_find_unused_parameters = False
        return super().train(*args, **kwargs)

    def training_step(
        self, model: nn.Module, inputs: dict[str, Any], num_items_in_batch: Any = None
    ) -> Tensor:
        """One micro-batch; after the last one of an optimizer step, gradients are averaged over the processes."""
        loss = super().training_step(model, inputs, num_items_in_batch)
        if self.is_fsdp_enabled and self.accelerator.sync_gradients:
            average_gradients([p for p in model.parameters() if p.requires_grad])
        return loss

    def evaluation_loop(self, *args: Any, **kwargs: Any) -> Any:
        """Loss on the validation rows."""
        output = super().evaluation_loop(*args, **kwargs)
        if self.is_fsdp_enabled:
            free_gathered(cast(nn.Module, self.model))
        return output

    def running_together(self, model: nn.Module) -> AbstractContextManager[None]:
        """Context in which each process may run another number of forwards of the model without gradients."""
        if not self.is_fsdp_enabled:
            return nullcontext()
        return in_lockstep(model, {"input_ids": torch.zeros(1, 1, dtype=torch.long, device=self.args.device)})

    @contextmanager
    def _adapter_alone(self) -> Iterator[None]:
        """Context in which `Trainer` sees the adapter, which is whole everywhere, and not the sharded base."""
        was, self.is_fsdp_enabled = self.is_fsdp_enabled, False
        try:
            yield
        finally:
            self.is_fsdp_enabled = was

    def save_model(self, output_dir: str | None = None, _internal_call: bool = False) -> None:
        """Save the adapter, in the first process."""
        with self._adapter_alone():
            super().save_model(output_dir, _internal_call)

    def _save_optimizer_and_scheduler(self, output_dir: str) -> None:
        with self._adapter_alone():
            super()._save_optimizer_and_scheduler(output_dir)

    def _load_from_checkpoint(self, resume_from_checkpoint: str, model: nn.Module | None = None) -> None:
        with self._adapter_alone():
            super()._load_from_checkpoint(resume_from_checkpoint, model)

    def _load_best_model(self) -> None:
        with self._adapter_alone():
            super()._load_best_model()

    def _load_optimizer_and_scheduler(self, checkpoint: str | None) -> None:
        with self._adapter_alone():
            super()._load_optimizer_and_scheduler(checkpoint)


def _trains_all(model: Any) -> bool:
    """Whether every step gives each trained parameter a gradient, as in GraphLoRA with both of its losses."""
    config = getattr(model, "active_peft_config", None)
    return (
        isinstance(config, GraphLoraConfig)
        and config.router_type == "graph"
        and bool(config.router_poisson_loss_coef and config.router_normal_loss_coef)
        and not config.modules_to_save
    )
