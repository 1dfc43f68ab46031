"""What the expert FFN works on: the frozen block as callables, the stacked low-rank weights, the dropout masks."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
from torch import Tensor

from graphlora.ops.expert_ffn.activations import DifferentiableAct


@dataclass(frozen=True)
class FrozenFfn:
    """The frozen FFN block, as the calls the experts share. The projections stay modules, so quantized ones work.

    Attributes:
        project_in: `[tokens, d] -> (gate, up)`, each `[tokens, f]`; gate is None for a plain (ungated) block.
        project_out: `[tokens, f] -> [tokens, d]`, bias included.
        act: the activation with its backward: of the gate in a gated block, of the up projection in a plain one.
        plain_weights: given x, the weights `(gate, up)`, each `[f, d]`, where `project_in` is nothing but two matrix
            products with them in x's dtype, so that a kernel may apply them itself; else None.
    """

    project_in: Callable[[Tensor], tuple[Tensor | None, Tensor]]
    project_out: Callable[[Tensor], Tensor]
    act: DifferentiableAct
    plain_weights: Callable[[Tensor], tuple[Tensor, Tensor] | None] | None = None


class ExpertWeights(NamedTuple):
    """Stacked low-rank pairs of one FFN block; the gate's are None for a plain block.

    Shapes: `A` is `[num_experts, r, in]`, `B` is `[num_experts, out, r]`.
    """

    gate_A: Tensor | None
    gate_B: Tensor | None
    up_A: Tensor
    up_B: Tensor
    down_A: Tensor
    down_B: Tensor

    def to(self, dtype: torch.dtype) -> ExpertWeights:
        """All tensors in `dtype`; gradients return to the originals."""
        cast: list[Any] = [None if t is None else t.to(dtype) for t in self]
        return ExpertWeights(*cast)

    def unbind(self) -> list[ExpertWeights]:
        """Every expert's own pairs, without the first dimension; their gradients are gathered by one call each."""
        absent = [None] * len(self.up_A)
        columns: list[Any] = [absent if t is None else t.unbind() for t in self]
        return [ExpertWeights(*own) for own in zip(*columns, strict=True)]


class LoraMasks(NamedTuple):
    """Dropout masks, already scaled by `1 / (1 - p)`; None where nothing is dropped. Shared by all experts.

    `gate`, `up` are `[tokens, d]` and `down` is `[tokens, f]`: the inputs of the low-rank branches alone.
    `hidden` is `[tokens, f]`: the base model's own dropout between activation and down projection (T5).
    """

    gate: Tensor | None = None
    up: Tensor | None = None
    down: Tensor | None = None
    hidden: Tensor | None = None


def draw_masks(
    x: Tensor,
    intermediate_size: int,
    gated: bool,
    lora_dropout: float,
    hidden_dropout: float,
    down: bool = True,
) -> LoraMasks:
    """One mask per projection input, drawn in a fixed order so that every compute path drops the same entries.

    Args:
        x: `[tokens, d]`, gives number of tokens, device and dtype.
        intermediate_size: f.
        gated: whether the block has a gate projection.
        lora_dropout: probability for the low-rank branches; 0 draws nothing.
        hidden_dropout: probability for the base model's dropout inside the FFN; 0 draws nothing.
        down: whether to draw the mask of the down projection's input, which a kernel may draw itself.
    """
    tokens, d = x.shape

    def mask(width: int, p: float) -> Tensor | None:
        if p == 0.0:
            return None
        return torch.nn.functional.dropout(x.new_ones(tokens, width), p)

    return LoraMasks(
        gate=mask(d, lora_dropout) if gated else None,
        up=mask(d, lora_dropout),
        down=mask(intermediate_size, lora_dropout) if down else None,
        hidden=mask(intermediate_size, hidden_dropout),
    )


def masked(x: Tensor, mask: Tensor | None) -> Tensor:
    """`x * mask`, or `x` itself where there is no mask."""
    return x if mask is None else x * mask
