"""K-expanded grouped matmul: every (token, choice) pair is a row of its own and runs the whole frozen block."""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn import functional as F

from graphlora.ops.expert_ffn import ExpertWeights


def _grouped(x: Tensor, weight: Tensor, ends: Tensor) -> Tensor:
    """Rows of `x` times the matrix of their group; `weight` is `[num_experts, in, out]`, `ends` the groups' ends."""
    if x.dtype == torch.bfloat16:
        return torch._grouped_mm(x, weight, offs=ends)
    starts = [0, *ends.tolist()]
    pieces = [x[start:end] @ w for start, end, w in zip(starts, starts[1:], weight, strict=False)]
    return torch.cat(pieces)


def expanded_ffn(
    x: Tensor,
    frozen: tuple[Tensor, Tensor, Tensor],
    experts: ExpertWeights,
    top_k_weights: Tensor,
    top_k_index: Tensor,
    scaling: float,
) -> Tensor:
    """Same function as `expert_ffn_eager` for a SwiGLU block without dropout; nothing of the base is shared.

    Args:
        x: `[tokens, d]`.
        frozen: weights of gate, up `[f, d]` and down `[d, f]`.
        experts: stacked low-rank pairs, in the dtype of `x`.
        top_k_weights: `[tokens, top_k]`.
        top_k_index: `[tokens, top_k]`.
        scaling: s = lora_alpha / r.
    """
    w_gate, w_up, w_down = frozen
    assert experts.gate_A is not None
    assert experts.gate_B is not None
    top_k = top_k_index.shape[1]
    flat = top_k_index.flatten()
    order = flat.argsort(stable=True)
    counts = F.one_hot(flat, experts.up_A.shape[0]).sum(0)
    ends = counts.cumsum(0).int()
    token = order // top_k
    rows = x[token]

    def adapted(z: Tensor, base: Tensor, a: Tensor, b: Tensor) -> Tensor:
        low = _grouped(z, a.transpose(1, 2), ends)
        return z @ base.T + scaling * _grouped(low, b.transpose(1, 2), ends)

    gate = adapted(rows, w_gate, experts.gate_A, experts.gate_B)
    up = adapted(rows, w_up, experts.up_A, experts.up_B)
    out = adapted(F.silu(gate) * up, w_down, experts.down_A, experts.down_B)
    weight = top_k_weights.flatten()[order].to(out.dtype)
    return torch.zeros_like(x).index_add(0, token, out * weight[:, None])
