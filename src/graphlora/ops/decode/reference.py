"""What each decode kernel computes, in PyTorch. All sums are float32; all functions work without gradients."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor
from torch.nn import functional as F

# Part of d that one program of `low_rank` reads, and rows of f that one program of `mix` owns.
SPLIT_DEPTH, F_BLOCK = 512, 64
_ACTIVATIONS = {
    "silu": F.silu,
    "gelu": F.gelu,
    "gelu_tanh": lambda x: F.gelu(x, approximate="tanh"),
    "relu": F.relu,
}


def project(x: Tensor, first: Tensor, second: Tensor, third: Tensor) -> tuple[Tensor, Tensor]:
    """Everything that is linear in the block's input, beside the big products.

    Args:
        x: `[tokens, d]`.
        first: `[rows, d]`, at full precision whatever the dtype of `x` is.
        second: likewise.
        third: likewise.

    Returns:
        `x [first | second | third]^T`, `[tokens, all rows]`, and `sum x^2` per token, `[tokens]`; float32.
    """
    wide = x.float()
    return wide @ torch.cat([first, second, third]).float().T, wide.square().sum(dim=1)


def low_rank(x: Tensor, weights: Sequence[Tensor]) -> Tensor:
    """`x A^T` of one to three A that read x.

    Args:
        x: `[tokens, d]`.
        weights: A, `[r, d]` each.

    Returns:
        All side by side, in parts that the reader adds: `[parts, tokens, all r]`, float32.
    """
    stacked = torch.cat(list(weights)).to(x.dtype).float()
    pieces = zip(x.float().split(SPLIT_DEPTH, 1), stacked.split(SPLIT_DEPTH, 1), strict=True)
    return torch.stack([x_piece @ weight_piece.T for x_piece, weight_piece in pieces])


def add_low_rank(
    low: Tensor, bases: Sequence[Tensor], weights: Sequence[Tensor], scaling: float
) -> list[Tensor]:
    """`base + s low B^T` for each base.

    Args:
        low: from `low_rank`, `[parts, tokens, all r]`.
        bases: what the frozen layers give, `[tokens, out]` each, in one dtype.
        weights: B, `[out, r]` each.
        scaling: s.
    """
    dtype = bases[0].dtype
    parts = low.sum(dim=0).to(dtype).float().split([weight.shape[1] for weight in weights], 1)
    return [
        (base.float() + scaling * (part @ weight.to(dtype).float().T)).to(dtype)
        for base, part, weight in zip(bases, parts, weights, strict=True)
    ]


def mix(
    gate: Tensor,
    up: Tensor,
    low: Tensor,
    gate_B: Tensor,
    up_B: Tensor,
    down_A: Tensor,
    top_k_weights: Tensor,
    top_k_index: Tensor,
    scaling: float,
    act: str,
) -> tuple[Tensor, Tensor]:
    """`m = sum_k w_k h_k` and `w_k A_down[k] h_k`, with `h_k = act(g + s B_gate[k] a1_k) (u + s B_up[k] a3_k)`.

    Args:
        gate: frozen gate projection, `[tokens, f]`.
        up: frozen up projection, `[tokens, f]`.
        low: `[a1 | a3 | ...]` of all experts, `[tokens, at least 2 N r]`, float32.
        gate_B: `[num_experts, f, r]`.
        up_B: `[num_experts, f, r]`.
        down_A: `[num_experts, r, f]`.
        top_k_weights: `[tokens, top_k]`.
        top_k_index: `[tokens, top_k]`; a token's experts differ.
        scaling: s.
        act: `"silu"`, `"gelu"`, `"gelu_tanh"` or `"relu"`.

    Returns:
        m, `[tokens, f]`, and the down projections in parts that the reader adds, `[parts, tokens, top_k, r]`, float32.
    """
    num_experts, r, _ = down_A.shape
    dtype = gate.dtype
    pairs = low[:, : 2 * num_experts * r].unflatten(1, (2, num_experts, r)).to(dtype).float()
    at = top_k_index[:, :, None].expand(-1, -1, r)
    low_gate, low_up = pairs[:, 0].gather(1, at), pairs[:, 1].gather(1, at)
    delta_gate = torch.einsum("tkr,tkfr->tkf", low_gate, gate_B.to(dtype).float()[top_k_index])
    delta_up = torch.einsum("tkr,tkfr->tkf", low_up, up_B.to(dtype).float()[top_k_index])
    hidden = _ACTIVATIONS[act](gate.float()[:, None] + scaling * delta_gate)
    hidden = hidden * (up.float()[:, None] + scaling * delta_up) * top_k_weights.float()[:, :, None]
    rounded = hidden.to(dtype).float()
    rows = down_A.to(dtype).float()[top_k_index]
    pieces = zip(rounded.split(F_BLOCK, -1), rows.split(F_BLOCK, -1), strict=True)
    down = torch.stack([torch.einsum("tkf,tkrf->tkr", *piece) for piece in pieces])
    return hidden.sum(dim=1).to(dtype), down


def combine(base: Tensor, low: Tensor, top_k_index: Tensor, down_B: Tensor, scaling: float) -> Tensor:
    """`base + s sum_k B_down[k] p_k`: base `[tokens, d]`, low p `[tokens, top_k, r]`, down_B `[num_experts, d, r]`."""
    low = low.to(base.dtype).float()
    delta = torch.einsum("tkr,tkdr->td", low, down_B.to(base.dtype).float()[top_k_index])
    return (base.float() + scaling * delta).to(base.dtype)
