"""Equations 3 and 5 of the paper: the frozen FFN, the routing and the experts give the new hidden states.

A function without state: `graphlora.tuner` holds the parameters and says what to record.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from graphlora.experts import dense_mixing, lora_delta_loop, mixed_lora_delta
from graphlora.ops.expert_ffn import ExpertWeights, FrozenFfn, draw_masks, expert_ffn_eager, expert_ffn_torch
from graphlora.ops.expert_ffn.inputs import LoraMasks, masked
from graphlora.router import Routing

# Rows of A that share a product with the router's projection: beyond, its backward kernel is no longer a skinny one.
_MOST_BESIDE = 512


@dataclass(frozen=True)
class MoeSettings:
    """How the experts of one FFN block are applied.

    Attributes:
        granularity: `"ffn"`: an expert is the whole block with its own deltas; `"linear"`: experts are mixed at each
            projection.
        scaling: s = lora_alpha / r.
        lora_dropout: dropout of the low-rank branches' inputs, 0 in evaluation.
        hidden_dropout: the base model's own dropout inside the FFN, 0 in evaluation.
        backend: `"eager"`, `"torch"` or `"triton"`.
        recompute_gate_up: run the frozen gate and up projections again in backward instead of saving what they give
            (not in the expert loop, nor for `"linear"` granularity).
    """

    granularity: str
    scaling: float
    lora_dropout: float
    hidden_dropout: float
    backend: str
    recompute_gate_up: bool = False


def low_rank_matrices(experts: ExpertWeights, x: Tensor) -> tuple[Tensor, Tensor] | None:
    """A of gate and up, where the fused router is to multiply the tokens `x` with them beside its own projection.

    Not under autocast, which rounds the tokens after the router saw them; nor where all ranks together are so many that
    the product is better left alone.
    """
    rows = 2 * experts.up_A.shape[0] * experts.up_A.shape[1]
    if experts.gate_A is None or rows > _MOST_BESIDE or torch.is_autocast_enabled(x.device.type):
        return None
    return experts.gate_A, experts.up_A


def moe_ffn(
    x: Tensor,
    ffn: FrozenFfn,
    experts: ExpertWeights,
    routing: Routing,
    settings: MoeSettings,
    low: Tensor | None = None,
) -> Tensor:
    """Output of an FFN block with routed LoRA experts.

    Args:
        x: `[tokens, d]`, in the compute dtype.
        ffn: the frozen block.
        experts: stacked low-rank pairs.
        routing: the router's decision for these tokens.
        settings: see `MoeSettings`.
        low: the tokens times `low_rank_matrices`, where the router made that product.

    Returns:
        `[tokens, d]` in the dtype that the frozen block gives.
    """
    if settings.backend == "triton" and settings.granularity == "ffn":
        return _triton(x, ffn, experts, routing, settings, low)
    experts = experts.to(x.dtype)
    intermediate_size = experts.up_B.shape[1]
    masks = draw_masks(
        x, intermediate_size, experts.gate_A is not None, settings.lora_dropout, settings.hidden_dropout
    )
    if settings.granularity == "linear":
        return _linear_granularity(x, ffn, experts, routing, settings, masks)
    weights, index = routing.top_k_weights, routing.top_k_index
    if settings.backend == "eager":
        return expert_ffn_eager(x, ffn, experts, weights, index, settings.scaling, masks)
    return expert_ffn_torch(
        x, ffn, experts, weights, index, settings.scaling, masks, settings.recompute_gate_up
    )


def _triton(
    x: Tensor,
    ffn: FrozenFfn,
    experts: ExpertWeights,
    routing: Routing,
    settings: MoeSettings,
    low: Tensor | None,
) -> Tensor:
    # Triton is there only where this path was chosen.
    from graphlora.ops.expert_ffn.triton import expert_ffn_triton

    weights, index = routing.top_k_weights, routing.top_k_index
    return expert_ffn_triton(
        x,
        ffn,
        experts,
        weights,
        index,
        settings.scaling,
        settings.lora_dropout,
        settings.recompute_gate_up,
        low,
    )


def _linear_granularity(
    x: Tensor,
    ffn: FrozenFfn,
    experts: ExpertWeights,
    routing: Routing,
    settings: MoeSettings,
    masks: LoraMasks,
) -> Tensor:
    """Each projection is `W z + s sum_e w_e B_e A_e z`, with one routing for the block (eq. 3 as printed)."""
    delta = lora_delta_loop if settings.backend == "eager" else mixed_lora_delta
    mixing = dense_mixing(routing.top_k_weights, routing.top_k_index, experts.up_A.shape[0])
    gate, up = ffn.project_in(x)
    up = up + delta(masked(x, masks.up), experts.up_A, experts.up_B, mixing, settings.scaling)
    if gate is None:
        hidden = ffn.act(up)
    else:
        assert experts.gate_A is not None
        assert experts.gate_B is not None
        gate = gate + delta(masked(x, masks.gate), experts.gate_A, experts.gate_B, mixing, settings.scaling)
        hidden = ffn.act(gate) * up
    hidden = masked(hidden, masks.hidden)
    out = ffn.project_out(hidden)
    return out + delta(masked(hidden, masks.down), experts.down_A, experts.down_B, mixing, settings.scaling)
