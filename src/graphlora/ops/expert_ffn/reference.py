"""The expert loop: equations 1, 2 and 5 of the paper, one expert after the other."""

from __future__ import annotations

import torch
from torch import Tensor

from graphlora.ops.expert_ffn.inputs import ExpertWeights, FrozenFfn, LoraMasks, masked


def expert_ffn_eager(
    x: Tensor,
    ffn: FrozenFfn,
    experts: ExpertWeights,
    top_k_weights: Tensor,
    top_k_index: Tensor,
    scaling: float,
    masks: LoraMasks,
) -> Tensor:
    """`y = sum over the selected e of w_e E_e(x)`, with `E_e` the whole block and its own deltas.

    Args:
        x: `[tokens, d]`.
        ffn: the frozen block.
        experts: stacked low-rank pairs, in the dtype of `x`.
        top_k_weights: `[tokens, top_k]`, summing to 1 per token.
        top_k_index: `[tokens, top_k]`.
        scaling: s = lora_alpha / r.
        masks: dropout masks.

    Returns:
        `[tokens, d]`.
    """
    gate, up = ffn.project_in(x)
    x_gate, x_up = masked(x, masks.gate), masked(x, masks.up)
    output: Tensor | None = None
    for e, own in enumerate(experts.unbind()):
        token, slot = torch.where(top_k_index == e)
        up_in = x_up[token]
        up_e = up[token] + scaling * (up_in @ own.up_A.T) @ own.up_B.T
        if gate is None:
            hidden = ffn.act(up_e)
        else:
            assert own.gate_A is not None
            assert own.gate_B is not None
            gate_in = up_in if x_gate is x_up else x_gate[token]
            gate_e = gate[token] + scaling * (gate_in @ own.gate_A.T) @ own.gate_B.T
            hidden = ffn.act(gate_e) * up_e
        hidden = hidden if masks.hidden is None else hidden * masks.hidden[token]
        dropped = hidden if masks.down is None else hidden * masks.down[token]
        expert_output = ffn.project_out(hidden) + scaling * (dropped @ own.down_A.T) @ own.down_B.T
        weight = top_k_weights[token, slot].to(expert_output.dtype)
        if output is None:
            output = expert_output.new_zeros(x.shape)
        output.index_add_(0, token, weight[:, None] * expert_output)
    assert output is not None
    return output
