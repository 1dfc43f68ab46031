"""The shared-base form of the expert FFN in PyTorch: each frozen projection runs once per token, whatever K is.

`W_down` is linear and shared by the experts, so

    sum_k w_k E_k(x) = W_down(m) + sum_k (s w_k p_k) B_down[k]^T,   m = sum_k w_k h_k,   p_k = A_down[k] h_k.

`ExpertMix` computes `m` and `P` (which holds `s w_k p_k` in the columns of expert k) from the frozen products. It saves
its inputs alone; every `[tokens, f]` intermediate is recomputed in backward. README.md has the derivation.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any, NamedTuple

import torch
from torch import Tensor

from graphlora.ops.expert_ffn.activations import DifferentiableAct
from graphlora.ops.expert_ffn.inputs import ExpertWeights, FrozenFfn, LoraMasks, masked


def expert_ffn_torch(
    x: Tensor,
    ffn: FrozenFfn,
    experts: ExpertWeights,
    top_k_weights: Tensor,
    top_k_index: Tensor,
    scaling: float,
    masks: LoraMasks,
) -> Tensor:
    """Same function as `expert_ffn_eager` (see there), with the base shared between the experts."""
    gate, up = ffn.project_in(x)
    low_up = masked(x, masks.up) @ experts.up_A.flatten(0, 1).T
    low_gate = None
    if gate is not None:
        assert experts.gate_A is not None
        low_gate = masked(x, masks.gate) @ experts.gate_A.flatten(0, 1).T
    mixed, low_down = ExpertMix.apply(
        gate, up, low_gate, low_up, experts.gate_B, experts.up_B, experts.down_A,
        top_k_weights, top_k_index, masks.hidden, masks.down, scaling, ffn.act,
    )  # fmt: skip
    out = ffn.project_out(mixed)
    down_B = experts.down_B.transpose(1, 2).flatten(0, 1)
    if out.dtype != low_down.dtype:
        # A float32 down projection beside half-precision layers (T5): what it gives may not fit half precision.
        return out + low_down @ down_B
    return torch.addmm(out, low_down, down_B)


class Part(NamedTuple):
    """Tokens that one low-rank pair, or one masked set of pairs, serves.

    Attributes:
        token: `[n]` token positions, or None for all tokens in order.
        slot: `[n]` which of a token's top-k choices this is, or an int for all.
        columns: slice of the `num_experts * r` columns in use.
        keep: `[n, num_experts * r]` mask of each token's own columns, or None where `columns` says it all.
    """

    token: Tensor | None
    slot: Tensor | int
    columns: slice
    keep: Tensor | None


def grouped_parts(top_k_index: Tensor, num_experts: int, r: int) -> Iterator[Part]:
    """One part per expert that has tokens; reads the counts on the host, so for CPU tensors."""
    order = torch.argsort(top_k_index.reshape(-1), stable=True)
    counts = torch.bincount(top_k_index.reshape(-1), minlength=num_experts).tolist()
    top_k = top_k_index.shape[1]
    start = 0
    for e, count in enumerate(counts):
        if count:
            rows = order[start : start + count]
            yield Part(rows // top_k, rows % top_k, slice(e * r, (e + 1) * r), None)
        start += count


def slot_parts(top_k_index: Tensor, num_experts: int, r: int, dtype: torch.dtype) -> Iterator[Part]:
    """One part per top-k slot with all tokens, columns masked: static shapes, no sort, no host sync."""
    for k in range(top_k_index.shape[1]):
        one_hot = torch.nn.functional.one_hot(top_k_index[:, k], num_experts)
        yield Part(None, k, slice(None), one_hot.to(dtype).repeat_interleave(r, dim=1))


def _parts(top_k_index: Tensor, num_experts: int, r: int, dtype: torch.dtype) -> Iterator[Part]:
    if top_k_index.device.type == "cpu" and not torch.compiler.is_compiling():
        return grouped_parts(top_k_index, num_experts, r)
    return slot_parts(top_k_index, num_experts, r, dtype)


def _rows(t: Tensor, part: Part) -> Tensor:
    return t if part.token is None else t[part.token]


def _low_rank(t: Tensor, part: Part) -> Tensor:
    """The part's own columns of `[tokens, num_experts * r]`, other experts' columns removed or zeroed."""
    rows = _rows(t, part)[:, part.columns]
    return rows if part.keep is None else rows * part.keep


def _weight(top_k_weights: Tensor, part: Part) -> Tensor:
    token = slice(None) if part.token is None else part.token
    return top_k_weights[token, part.slot][:, None]


def _add(total: Tensor, part: Part, value: Tensor) -> None:
    if part.token is None:
        total += value
    else:
        total.index_add_(0, part.token, value.to(total.dtype))


class ExpertMix(torch.autograd.Function):
    """`(m, P)` of the selected experts; see the module docstring. First-order gradients only."""

    @staticmethod
    def forward(
        ctx: Any,
        gate: Tensor | None,
        up: Tensor,
        low_gate: Tensor | None,
        low_up: Tensor,
        gate_B: Tensor | None,
        up_B: Tensor,
        down_A: Tensor,
        top_k_weights: Tensor,
        top_k_index: Tensor,
        hidden_mask: Tensor | None,
        down_mask: Tensor | None,
        scaling: float,
        act: DifferentiableAct,
    ) -> tuple[Tensor, Tensor]:
        """Args: frozen products `[tokens, f]`, low-rank inputs `[tokens, N r]`, stacked weights, routing, masks."""
        ctx.save_for_backward(
            gate,
            up,
            low_gate,
            low_up,
            gate_B,
            up_B,
            down_A,
            top_k_weights,
            top_k_index,
            hidden_mask,
            down_mask,
        )
        ctx.scaling, ctx.act = scaling, act
        num_experts, r, _ = down_A.shape
        rank_down = down_A.flatten(0, 1)
        rank_up = up_B.transpose(1, 2).flatten(0, 1)
        rank_gate = None if gate_B is None else gate_B.transpose(1, 2).flatten(0, 1)
        mixed = torch.zeros_like(up)
        low_down = torch.zeros_like(low_up)
        weights = top_k_weights.to(up.dtype)
        for part in _parts(top_k_index, num_experts, r, up.dtype):
            hidden = _pre_activation(up, low_up, rank_up, part, scaling)
            if gate is None:
                hidden = act(hidden)
            else:
                assert low_gate is not None
                assert rank_gate is not None
                hidden = act(_pre_activation(gate, low_gate, rank_gate, part, scaling)).mul_(hidden)
            hidden = hidden * _weight(weights, part)
            if hidden_mask is not None:
                hidden = hidden * _rows(hidden_mask, part)
            _add(mixed, part, hidden)
            dropped = hidden if down_mask is None else hidden * _rows(down_mask, part)
            low = scaling * (dropped @ rank_down[part.columns].T)
            _add(low_down[:, part.columns], part, low if part.keep is None else low * part.keep)
        return mixed, low_down

    @staticmethod
    def backward(ctx: Any, *grad_outputs: Tensor) -> tuple[Tensor | None, ...]:
        """Gradients in the order of `forward`'s arguments; the notation is README.md's."""
        d_mixed, d_low_down = grad_outputs
        gate, up, low_gate, low_up, gate_B, up_B, down_A, weights32, top_k_index, hidden_mask, down_mask = (
            ctx.saved_tensors
        )
        s, act = ctx.scaling, ctx.act
        num_experts, r, _ = down_A.shape
        rank_down = down_A.flatten(0, 1)
        rank_up = up_B.transpose(1, 2).flatten(0, 1)
        d_up, d_low_up, d_rank_up = torch.zeros_like(up), torch.zeros_like(low_up), torch.zeros_like(rank_up)
        d_rank_down, d_weights = torch.zeros_like(rank_down), torch.zeros_like(weights32)
        rank_gate: Any = None
        d_gate: Any = None
        d_low_gate: Any = None
        d_rank_gate: Any = None
        if gate is not None:
            rank_gate = gate_B.transpose(1, 2).flatten(0, 1)
            d_gate, d_low_gate = torch.zeros_like(gate), torch.zeros_like(low_gate)
            d_rank_gate = torch.zeros_like(rank_gate)
        weights = weights32.to(up.dtype)
        for part in _parts(top_k_index, num_experts, r, up.dtype):
            w, columns = _weight(weights, part), part.columns
            up_k = _pre_activation(up, low_up, rank_up, part, s)
            gate_k = None if gate is None else _pre_activation(gate, low_gate, rank_gate, part, s)
            activated = act(up_k if gate_k is None else gate_k)
            hidden = activated if gate_k is None else activated * up_k
            d_low = s * _low_rank(d_low_down, part)
            q = d_low @ rank_down[columns]
            dropped = hidden
            if down_mask is not None:
                q, dropped = q * _rows(down_mask, part), dropped * _rows(down_mask, part)
            q += _rows(d_mixed, part)
            if hidden_mask is not None:
                q, dropped = q * _rows(hidden_mask, part), dropped * _rows(hidden_mask, part)
            d_rank_down[columns] += (w * d_low).T @ dropped
            token = slice(None) if part.token is None else part.token
            d_weights[token, part.slot] = (q * hidden).sum(dim=-1, dtype=torch.float32).to(d_weights.dtype)
            d_hidden = q.mul_(w)
            if gate_k is None:
                d_up_k = act.backward(d_hidden, up_k)
            else:
                d_gate_k = act.backward(d_hidden * up_k, gate_k)
                _backward_pre_activation(
                    d_gate_k, low_gate, rank_gate, part, s, d_gate, d_low_gate, d_rank_gate
                )
                d_up_k = d_hidden.mul_(activated)
            _backward_pre_activation(d_up_k, low_up, rank_up, part, s, d_up, d_low_up, d_rank_up)

        def unstack(d_rank: Tensor | None) -> Tensor | None:
            return None if d_rank is None else d_rank.view(num_experts, r, -1).transpose(1, 2)

        return (
            d_gate, d_up, d_low_gate, d_low_up, unstack(d_rank_gate), unstack(d_rank_up),
            d_rank_down.view(num_experts, r, -1), d_weights, None, None, None, None, None,
        )  # fmt: skip


def _pre_activation(base: Tensor, low: Tensor, rank: Tensor, part: Part, scaling: float) -> Tensor:
    """`base + s (low columns) B^T` for the part's tokens; `rank` is `[num_experts * r, f]`."""
    return torch.addmm(_rows(base, part), _low_rank(low, part), rank[part.columns], alpha=scaling)


def _backward_pre_activation(
    d_pre: Tensor,
    low: Tensor,
    rank: Tensor,
    part: Part,
    scaling: float,
    d_base: Tensor,
    d_low: Tensor,
    d_rank: Tensor,
) -> None:
    """Adds the gradients of `_pre_activation`'s inputs to `d_base`, `d_low` and `d_rank`."""
    _add(d_base, part, d_pre)
    grad = scaling * (d_pre @ rank[part.columns].T)
    _add(d_low[:, part.columns], part, grad if part.keep is None else grad * part.keep)
    d_rank[part.columns] += scaling * (_low_rank(low, part).T @ d_pre)
