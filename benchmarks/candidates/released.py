"""What the authors' released code does for a block: gate and up once, then the rest of the block for every expert."""

from __future__ import annotations

import torch
from torch import Tensor

from graphlora.moe import MoeSettings
from graphlora.ops.expert_ffn import ExpertWeights, FrozenFfn
from graphlora.router import Routing


def released_moe_ffn(
    x: Tensor,
    ffn: FrozenFfn,
    experts: ExpertWeights,
    routing: Routing,
    settings: MoeSettings,
    low: Tensor | None = None,
) -> Tensor:
    """Same function as `moe_ffn` for a gated block without dropout; adapters stay float32 and so do their products.

    The frozen down projection runs for every selected expert of a token, as do the activation and all low-rank parts.

    Raises:
        ValueError: dropout or an ungated block.
    """
    del low
    gate, up = ffn.project_in(x)
    if gate is None or settings.lora_dropout or settings.hidden_dropout:
        raise ValueError("the released way is for gated blocks without dropout")

    def add(base: Tensor, value: Tensor, A: Tensor, B: Tensor) -> Tensor:
        return base + (settings.scaling * (value.to(A.dtype) @ A.T) @ B.T).to(base.dtype)

    result = torch.zeros_like(x)
    for e, own in enumerate(experts.unbind()):
        rows, choice = torch.where(routing.top_k_index == e)
        tokens = x[rows]
        assert own.gate_A is not None
        assert own.gate_B is not None
        hidden = ffn.act(add(gate[rows], tokens, own.gate_A, own.gate_B))
        hidden = hidden * add(up[rows], tokens, own.up_A, own.up_B)
        out = add(ffn.project_out(hidden), hidden, own.down_A, own.down_B)
        weight = routing.top_k_weights[rows, choice].to(out.dtype)
        result = result.index_add(0, rows, weight[:, None] * out)
    return result
