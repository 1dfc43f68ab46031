"""The plain loop over experts that `eager` is held to: gate and up once, then every expert by itself."""

from __future__ import annotations

import torch
from torch import Tensor

from graphlora.ops.expert_ffn import ExpertWeights, FrozenFfn, LoraMasks


def loop_ffn(
    x: Tensor,
    ffn: FrozenFfn,
    experts: ExpertWeights,
    top_k_weights: Tensor,
    top_k_index: Tensor,
    scaling: float,
    masks: LoraMasks,
) -> Tensor:
    """Same function as `expert_ffn_eager` for a gated block without dropout, with nothing shared beyond gate and up.

    Raises:
        ValueError: dropout masks or an ungated block.
    """
    gate, up = ffn.project_in(x)
    if gate is None or experts.gate_A is None or experts.gate_B is None or any(m is not None for m in masks):
        raise ValueError("the plain loop is for gated blocks without dropout")
    result = torch.zeros_like(x)
    for e, (a1, b1, a3, b3, a2, b2) in enumerate(
        zip(*(stack.unbind(0) for stack in experts if stack is not None), strict=True)
    ):
        rows, choice = torch.where(top_k_index == e)
        if rows.numel() == 0:
            continue
        tokens = x[rows]
        gate_e = gate[rows] + scaling * (tokens @ a1.T) @ b1.T
        up_e = up[rows] + scaling * (tokens @ a3.T) @ b3.T
        hidden = ffn.act(gate_e) * up_e
        out = ffn.project_out(hidden) + scaling * (hidden @ a2.T) @ b2.T
        weight = top_k_weights[rows, choice].to(out.dtype)
        result = result.index_add(0, rows, out * weight.unsqueeze(1))
    return result
