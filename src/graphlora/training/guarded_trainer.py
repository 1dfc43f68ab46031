"""`Trainer` with a guard against losses and gradients that are not finite."""

from __future__ import annotations

import sys
from collections.abc import Sequence
from typing import Any

from accelerate.utils import gather_object
from torch import Tensor, nn
from tqdm import tqdm

from graphlora.training.nonfinite import NonFiniteGuard, Step
from graphlora.training.origin import NamedRows, first_nonfinite
from graphlora.training.sharded_trainer import ShardedTrainer

UNREPEATED = "a second run of its batch was finite: look for an unreliable device"


class GuardedTrainer(ShardedTrainer):
    """`Trainer` whose steps a `NonFiniteGuard` watches; subclasses call it around each micro-batch."""

    def __init__(
        self,
        *args: Any,
        tokenizer: Any,
        skips_nonfinite: bool = False,
        max_skipped_steps: int = 0,
        row_names: Sequence[str] = (),
        **kwargs: Any,
    ) -> None:
        """Set up training.

        Args:
            args: Arguments of `Trainer`.
            tokenizer: Tokenizer of the model.
            skips_nonfinite: Leave out steps whose loss or gradient is not finite; otherwise the first ends the run.
            max_skipped_steps: How many may be left out.
            row_names: Names of the rows to train on, for messages.
            kwargs: Arguments of `Trainer`.
        """
        self.tokenizer: Any = tokenizer
        self.skips_nonfinite, self.max_skipped_steps = skips_nonfinite, max_skipped_steps
        self.row_names = row_names
        self.guard: NonFiniteGuard | None = None
        super().__init__(*args, **kwargs)

    def begin_guarded(self, num_items: Any) -> None:
        """Called before a micro-batch."""
        if self.guard is None:
            self.guard = self._make_guard()
        self.guard.begin(self.state.global_step + 1, num_items)

    def end_guarded(self, inputs: dict[str, Any], loss: Tensor) -> Tensor:
        """Called after a micro-batch with its inputs and its loss; the loss to log."""
        assert self.guard is not None
        return self.guard.note(inputs, loss)

    def settle(self) -> None:
        """Look at the last step now; see `NonFiniteGuard.settle`."""
        if self.guard is not None:
            self.guard.settle()

    def skipped(self) -> dict[str, float]:
        """Steps left out so far, for the log; nothing where there were none."""
        count = 0 if self.guard is None else self.guard.num_skipped
        return {"skipped_steps": count} if count else {}

    def close_guard(self) -> None:
        """Leave the optimizer as it was."""
        if self.guard is not None:
            self.guard.close()

    def _get_grad_norm(self, model: nn.Module, grad_norm: Any = None) -> Any:
        """The gradient's norm; here a step is found to be finite or not, before the optimizer's."""
        norm = super()._get_grad_norm(model, grad_norm=grad_norm)
        if self.guard is not None:
            self.guard.decide(norm)
        return norm

    def _make_guard(self) -> NonFiniteGuard:
        optimizer: Any = self.optimizer
        guard = NonFiniteGuard(
            self.accelerator.unwrap_model(self.model),
            getattr(optimizer, "optimizer", optimizer),
            skip=self.skips_nonfinite,
            max_skipped=self.max_skipped_steps,
            scaled=getattr(self.accelerator, "scaler", None) is not None,
            several=self.accelerator.num_processes > 1,
            explain=self._explained,
            tell=self._tell,
        )
        logged = (
            entry["skipped_steps"] for entry in self.state.log_history[::-1] if "skipped_steps" in entry
        )
        guard.num_skipped = int(next(logged, 0))
        return guard

    def _tell(self, line: str) -> None:
        if self.is_world_process_zero():
            tqdm.write(line, file=sys.stderr)

    def _explained(self, step: Step) -> str:
        """Run a step again and say what in it is not finite first, and for which rows of the data."""
        model: Any = self.accelerator.unwrap_model(self.model)

        def loss_of(inputs: dict[str, Any]) -> Tensor:
            with self.compute_loss_context_manager():
                loss: Any = self.compute_loss(
                    model, self._prepare_inputs(inputs), num_items_in_batch=step.num_items
                )
            return loss

        known = self.train_dataset if isinstance(self.train_dataset, list) else []
        data = NamedRows(known, self.row_names, self.tokenizer.decode)
        part = first_nonfinite(model, step.batches, loss_of, data)
        parts = gather_object([part]) if self.accelerator.num_processes > 1 else [part]
        # What one process computes of all of them (expert loads) is spoiled by the others: the first tensor counts.
        return min((part for part in parts if part is not None), default=(0, 0, UNREPEATED))[2]
