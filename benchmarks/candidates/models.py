"""Whole models with random weights, the adapters put on them, and one training step of each."""

from __future__ import annotations

import re
from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from typing import Any, cast
from unittest import mock

import torch
from peft import LoraConfig, get_peft_model
from torch import Tensor, nn
from transformers import AutoConfig, PretrainedConfig

import graphlora.moe
import graphlora.tuner.layer
from benchmarks.candidates.ffn import ALPHA, BACKENDS, DROPOUT, NUM_EXPERTS, PROJECTIONS, TOP_K
from benchmarks.candidates.loop import loop_ffn
from benchmarks.candidates.published import moe_peft_mixlora
from benchmarks.candidates.released import released_moe_ffn
from benchmarks.shapes import Shape
from graphlora import GraphLoraConfig
from graphlora.benchmark.random_model import twin
from graphlora.benchmark.timing import Call, Stopwatch
from graphlora.training.data import IGNORED
from graphlora.training.full_rows import masks_without_waiting
from graphlora.tuner.masks import every_token

ALL_LINEAR = ["q_proj", "k_proj", "v_proj", "o_proj", *PROJECTIONS]
# Rank of the experts whose number of FFN weights `peft_sized` matches.
SIZED_RANK = 8


def model_config(shape: Shape, num_layers: int) -> PretrainedConfig:
    """The config that transformers makes the shape's model from."""
    return AutoConfig.for_model(
        shape.model_type,
        vocab_size=shape.vocab_size,
        hidden_size=shape.hidden_size,
        intermediate_size=shape.intermediate_size,
        num_hidden_layers=num_layers,
        num_attention_heads=shape.num_heads,
        num_key_value_heads=shape.num_kv_heads,
        max_position_embeddings=8192,
        tie_word_embeddings=shape.tied,
        use_cache=False,
        bos_token_id=None,
        eos_token_id=None,
        pad_token_id=None,
    )


def graphlora_config(r: int, backend: str, dropout: float = 0.0) -> GraphLoraConfig:
    """The default preset with attention LoRA."""
    return GraphLoraConfig(
        task_type="CAUSAL_LM", r=r, lora_alpha=ALPHA, num_experts=NUM_EXPERTS, top_k=TOP_K,
        lora_dropout=dropout, backend=cast(Any, backend),
    )  # fmt: skip


def lora_config(r: int, dropout: float = 0.0) -> LoraConfig:
    """Plain LoRA on the same projections."""
    return LoraConfig(
        task_type="CAUSAL_LM", r=r, lora_alpha=int(ALPHA), lora_dropout=dropout, target_modules=ALL_LINEAR
    )


def sized_config() -> LoraConfig:
    """Plain LoRA whose FFN ranks add up to those of all experts together; attention as the experts' rank."""
    rank = NUM_EXPERTS * SIZED_RANK
    return LoraConfig(
        task_type="CAUSAL_LM", r=SIZED_RANK, lora_alpha=int(ALPHA), target_modules=ALL_LINEAR,
        rank_pattern=dict.fromkeys(PROJECTIONS, rank), alpha_pattern=dict.fromkeys(PROJECTIONS, 2 * rank),
    )  # fmt: skip


@dataclass
class ModelCandidate:
    """A model that can take a training step.

    Attributes:
        model: the model, adapted or frozen.
        trained: parameters that the optimizer updates; empty for the frozen model, whose input wants a gradient.
        optimizer: fused AdamW, or None.
        around: what a step runs within.
        full_rows: no row is padded and the step is told so, as `graphlora train` does it.
    """

    model: nn.Module
    trained: list[nn.Parameter]
    optimizer: torch.optim.Optimizer | None
    around: Callable[[], AbstractContextManager[Any]] = nullcontext
    full_rows: bool = False

    def forward_backward(self, input_ids: Tensor, **inputs: Tensor) -> Tensor:
        """Loss of a batch whose tokens all count, and its gradients."""
        told = self.full_rows and "attention_mask" not in inputs
        if told:
            inputs["attention_mask"] = every_token(input_ids)
        with self.around(), masks_without_waiting(told):
            if self.trained:
                loss = self.model(input_ids=input_ids, labels=input_ids, **inputs).loss
            else:
                embedding = cast(Any, self.model).get_input_embeddings()
                hidden = embedding(input_ids).detach().requires_grad_()
                loss = self.model(inputs_embeds=hidden, labels=input_ids, **inputs).loss
            loss.backward()
        return loss

    def step(self, ids: Tensor) -> Tensor:
        """Forward, loss, backward, optimizer."""
        loss = self.forward_backward(ids)
        if self.optimizer is not None:
            self.optimizer.step()
            self.optimizer.zero_grad(set_to_none=True)
        return loss

    def call(self, ids: Tensor) -> Call:
        """One step as a timed call."""

        def call(watch: Stopwatch) -> None:
            self.forward_backward(ids)
            watch.lap("forward_backward")
            if self.optimizer is not None:
                self.optimizer.step()
                self.optimizer.zero_grad(set_to_none=True)
            watch.lap("optimizer")

        return call

    def own_bytes(self) -> int:
        """Bytes of parameters, buffers and the optimizer's state."""
        tensors = [*self.model.parameters(), *self.model.buffers()]
        if self.optimizer is not None:
            for state in self.optimizer.state.values():
                tensors += [value for value in state.values() if isinstance(value, Tensor)]
        return sum({t.data_ptr(): t.numel() * t.element_size() for t in tensors}.values())


def step_candidate(name: str, base: nn.Module) -> ModelCandidate:
    """A candidate on a twin of the base, by the name that the registry gives it: what, dtype, dropout and rank.

    Raises:
        KeyError: an unknown name.
        NotHere: published code that is not installed.
    """
    model = twin(base)
    if name == "frozen":
        return ModelCandidate(model, [], None)
    rank = int(found.group(1)) if (found := re.search(r"_r(\d+)$", name)) else SIZED_RANK
    dropout = DROPOUT if "_dropout" in name else 0.0
    kind = name.split("_")[0]
    around: Callable[[], AbstractContextManager[Any]] = nullcontext
    if kind == "peft":
        config = sized_config() if "sized" in name else lora_config(rank, dropout)
        adapted = get_peft_model(model, config, autocast_adapter_dtype="float32" in name)
    elif kind in BACKENDS:
        adapted = get_peft_model(model, graphlora_config(rank, kind, dropout))
    elif kind == "loop":
        adapted = get_peft_model(model, graphlora_config(rank, "eager", dropout))
        around = _plain_loop
    elif kind == "released":
        adapted = get_peft_model(model, graphlora_config(rank, "eager", dropout))
        around = _released_way
    elif name.startswith("moe_peft_mixlora"):
        adapted = moe_peft_mixlora(model, rank, DROPOUT, ALL_LINEAR)
    else:
        raise KeyError(name)
    adapted.train()
    trained = [p for p in adapted.parameters() if p.requires_grad]
    fused = trained[0].device.type == "cuda"
    optimizer = torch.optim.AdamW(trained, lr=1e-4, fused=fused)
    return ModelCandidate(cast(nn.Module, adapted), trained, optimizer, around)


def _plain_loop() -> AbstractContextManager[Any]:
    return mock.patch.object(graphlora.moe, "expert_ffn_eager", loop_ffn)


def _released_way() -> AbstractContextManager[Any]:
    return mock.patch.object(graphlora.tuner.layer, "moe_ffn", released_moe_ffn)


def random_tokens(shape: Shape, batch: int, length: int, device: torch.device, seed: int = 0) -> Tensor:
    """`[batch, length]` random token ids."""
    generator = torch.Generator(device).manual_seed(seed)
    return torch.randint(0, shape.vocab_size, (batch, length), device=device, generator=generator)


def random_rows(shape: Shape, count: int, shortest: int, longest: int) -> list[dict[str, list[int]]]:
    """Rows of random tokens and of lengths between two bounds, with labels on their last quarter."""
    generator = torch.Generator().manual_seed(0)
    rows = []
    for length in torch.randint(shortest, longest + 1, (count,), generator=generator).tolist():
        ids = torch.randint(3, shape.vocab_size, (length,), generator=generator).tolist()
        asked = length - max(1, length // 4)
        rows.append({"input_ids": ids, "labels": [IGNORED] * asked + ids[asked:]})
    return rows


def step_flops(shape: Shape, num_layers: int, tokens: int, length: int, num_adapter: int) -> float:
    """FLOPs of a training step on a frozen base: `4 N_matmul + 6 N_adapter` and causal attention per token.

    A frozen weight costs a product forward and one backward (its own gradient is not computed), an adapter's weight
    one more. Attention sees half of the positions: `2 * length * d` forward and twice that backward, per layer.
    """
    attention = 6 * length * shape.hidden_size * num_layers
    return tokens * (4.0 * shape.num_matmul(num_layers) + 6.0 * num_adapter + attention)


def active_adapter_weights(model: nn.Module) -> int:
    """Trained weights that a token uses: of experts, stacked or one by one, the K selected ones."""
    total = 0
    for name, p in model.named_parameters():
        if not p.requires_grad:
            continue
        stacked = p.dim() == 3 and ("lora_A" in name or "lora_B" in name)
        apart = name.startswith("experts.")
        total += p.numel() * TOP_K // NUM_EXPERTS if stacked or apart else p.numel()
    return total
