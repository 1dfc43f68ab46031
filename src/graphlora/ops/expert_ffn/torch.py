"""The shared-base form of the expert FFN in PyTorch: each frozen projection runs once per token, whatever K is.

`W_down` is linear and shared by the experts, so

    sum_k w_k E_k(x) = W_down(m) + sum_k (s w_k p_k) B_down[k]^T,   m = sum_k w_k h_k,   p_k = A_down[k] h_k.

`ExpertMix` computes `m` and `P` (which holds `s w_k p_k` in the columns of expert k) from the frozen products. It saves
its inputs alone; every `[tokens, f]` intermediate is recomputed in backward. README.md has the derivation.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from graphlora.ops.expert_ffn.activations import DifferentiableAct
from graphlora.ops.expert_ffn.inputs import ExpertWeights, FrozenFfn, LoraMasks, masked
from graphlora.ops.expert_ffn.pairs import Pairs, Part, order_pairs
from graphlora.ops.expert_ffn.recompute import maybe_recompute


def expert_ffn_torch(
    x: Tensor,
    ffn: FrozenFfn,
    experts: ExpertWeights,
    top_k_weights: Tensor,
    top_k_index: Tensor,
    scaling: float,
    masks: LoraMasks,
    recompute_gate_up: bool = False,
) -> Tensor:
    """Same function as `expert_ffn_eager` (see there), with the base shared between the experts.

    `recompute_gate_up` runs the frozen gate and up projections again in backward instead of saving what they give.
    """
    low_up = masked(x, masks.up) @ experts.up_A.flatten(0, 1).T
    low_gate = None
    if experts.gate_A is not None:
        low_gate = masked(x, masks.gate) @ experts.gate_A.flatten(0, 1).T

    def mix(x: Tensor, low_gate: Tensor | None, low_up: Tensor, weights: Tensor) -> tuple[Tensor, Tensor]:
        gate, up = ffn.project_in(x)
        return ExpertMix.apply(
            gate, up, low_gate, low_up, experts.gate_B, experts.up_B, experts.down_A,
            weights, top_k_index, masks.hidden, masks.down, scaling, ffn.act,
        )  # fmt: skip

    mixed, low_down = maybe_recompute(recompute_gate_up, mix, x, low_gate, low_up, top_k_weights)
    out = ffn.project_out(mixed)
    down_B = experts.down_B.transpose(1, 2).flatten(0, 1)
    if out.dtype != low_down.dtype:
        # A float32 down projection beside half-precision layers (T5): what it gives may not fit half precision.
        return out + low_down @ down_B
    return torch.addmm(out, low_down, down_B)


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
            gate, up, low_gate, low_up, gate_B, up_B, down_A, top_k_weights, top_k_index, hidden_mask, down_mask
        )  # fmt: skip
        ctx.scaling, ctx.act = scaling, act
        num_experts, r, width = down_A.shape
        pairs = order_pairs(top_k_index, num_experts, r, width, up.dtype)
        buffers = _Buffers(pairs, up)
        up_side = _LowRankSide(up, low_up, up_B, pairs, scaling)
        gate_side = None
        if gate is not None:
            assert low_gate is not None
            assert gate_B is not None
            gate_side = _LowRankSide(gate, low_gate, gate_B, pairs, scaling)
        rank_down = down_A.flatten(0, 1)
        weights = pairs.spread_weights(top_k_weights.to(up.dtype))[:, None]
        mixed = torch.zeros_like(up)
        low_parts = []
        for part in pairs.parts():
            hidden = up_side.of(part, buffers("up", part))
            if gate_side is None:
                hidden = act.into(hidden, buffers("up", part))
            else:
                gate_k = gate_side.of(part, buffers("gate", part))
                hidden = act.into(gate_k, buffers("gate", part)).mul_(hidden)
            hidden = torch.mul(hidden, weights[part.pairs], out=buffers("up", part))
            if hidden_mask is not None:
                hidden *= _rows(hidden_mask, part, buffers("gate", part))
            mixed = _sum(mixed, part, hidden)
            if down_mask is not None:
                hidden *= _rows(down_mask, part, buffers("gate", part))
            low_parts.append(_times_transposed(hidden, rank_down[part.columns]))
        if not low_parts:
            return mixed, torch.zeros_like(low_up)
        return mixed, pairs.collect_low(scaling * torch.cat(low_parts))

    @staticmethod
    def backward(ctx: Any, *grad_outputs: Tensor) -> tuple[Tensor | None, ...]:
        """Gradients in the order of `forward`'s arguments; the notation is README.md's."""
        d_mixed, d_low_down = grad_outputs
        gate, up, low_gate, low_up, gate_B, up_B, down_A, top_k_weights, top_k_index, hidden_mask, down_mask = (
            ctx.saved_tensors
        )  # fmt: skip
        act = ctx.act
        num_experts, r, width = down_A.shape
        pairs = order_pairs(top_k_index, num_experts, r, width, up.dtype)
        buffers = _Buffers(pairs, up)
        up_side = _LowRankSide(up, low_up, up_B, pairs, ctx.scaling).with_gradients()
        gate_side = None
        if gate is not None:
            gate_side = _LowRankSide(gate, low_gate, gate_B, pairs, ctx.scaling).with_gradients()
        rank_down = down_A.flatten(0, 1)
        d_rank_down = torch.zeros_like(rank_down)
        weights = pairs.spread_weights(top_k_weights.to(up.dtype))[:, None]
        d_weights = []
        d_low = ctx.scaling * pairs.spread_low(d_low_down)
        for part in pairs.parts():
            w, d_low_k = weights[part.pairs], d_low[part.pairs]
            up_k = up_side.of(part, buffers("up", part))
            gate_k = up_k if gate_side is None else gate_side.of(part, buffers("gate", part))
            activated = act.into(gate_k, buffers("activated", part))
            hidden = activated
            if gate_side is not None:
                hidden = torch.mul(activated, up_k, out=buffers("hidden", part))
            q = _grad_of_weighted_hidden(part, d_mixed, d_low_k, rank_down, hidden_mask, down_mask, buffers)
            dropped = _dropped(hidden, part, hidden_mask, down_mask, buffers)
            d_rank_down[part.columns].addmm_((w * d_low_k).T, dropped)
            product = torch.mul(q, hidden, out=buffers("product", part))
            d_weights.append(product.sum(dim=-1, dtype=torch.float32))
            q = q.mul_(w)
            if gate_side is None:
                d_up_k = act.backward(q, up_k, buffers("product", part))
            else:
                d_up_k = torch.mul(q, activated, out=buffers("activated", part))
                gate_side.backward(part, act.backward(q.mul_(up_k), gate_k, buffers("product", part)))
            up_side.backward(part, d_up_k)
        d_top_k_weights = torch.zeros_like(top_k_weights)
        if d_weights:
            d_top_k_weights = pairs.collect_weights(torch.cat(d_weights)).to(top_k_weights.dtype)
        d_gate, d_low_gate, d_gate_B = (None, None, None) if gate_side is None else gate_side.gradients()
        d_up, d_low_up, d_up_B = up_side.gradients()
        return (
            d_gate, d_up, d_low_gate, d_low_up, d_gate_B, d_up_B, d_rank_down.view_as(down_A), d_top_k_weights,
            None, None, None, None, None,
        )  # fmt: skip


class _LowRankSide:
    """`W x + s B_k (A_k x)` before the activation, for the gate or for the up projection, and its gradients.

    Args:
        base: `W x`, `[tokens, f]`.
        low: `A x` of all experts, `[tokens, num_experts * r]`.
        stacked_B: `[num_experts, f, r]`.
        pairs: the order of the pairs.
        scaling: s.
    """

    def __init__(self, base: Tensor, low: Tensor, stacked_B: Tensor, pairs: Pairs, scaling: float) -> None:
        self.base, self.pairs, self.shape = base, pairs, stacked_B.shape
        self.rank = stacked_B.transpose(1, 2).flatten(0, 1)
        self.low = scaling * pairs.spread_low(low)
        self.scaling = scaling

    def of(self, part: Part, out: Tensor | None) -> Tensor:
        """The part's rows, `[n, f]`."""
        low, rank = self.low[part.pairs], self.rank[part.columns]
        if part.token is None:
            return torch.addmm(self.base, low, rank)
        return torch.index_select(self.base, 0, part.token, out=out).addmm_(low, rank)

    def with_gradients(self) -> _LowRankSide:
        """Itself, ready for `backward`."""
        self.d_base, self.d_rank = torch.zeros_like(self.base), torch.zeros_like(self.rank)
        self.d_low: list[Tensor] = []
        return self

    def backward(self, part: Part, grad: Tensor) -> None:
        """Takes the gradient of `of(part)`, `[n, f]`."""
        self.d_base = _sum(self.d_base, part, grad)
        self.d_low.append(_times_transposed(grad, self.rank[part.columns]))
        self.d_rank[part.columns].addmm_(self.low[part.pairs].T, grad)

    def gradients(self) -> tuple[Tensor, Tensor, Tensor]:
        """Of base, low and stacked_B, once every part had its `backward`."""
        num_experts, width, r = self.shape
        d_low = self.base.new_zeros(len(self.base), num_experts * r)
        if self.d_low:
            d_low = self.pairs.collect_low(self.scaling * torch.cat(self.d_low))
        return self.d_base, d_low, self.d_rank.view(num_experts, r, width).transpose(1, 2)


class _Buffers:
    """Memory that the parts write their `[n, f]` intermediates into, one after the other."""

    def __init__(self, pairs: Pairs, like: Tensor) -> None:
        self._rows, self._like = pairs.buffer_rows, like
        self._buffers: dict[str, Tensor] = {}

    def __call__(self, name: str, part: Part) -> Tensor | None:
        """`[n, f]`, the same memory for the same name; None where parts make their own tensors."""
        if self._rows is None:
            return None
        if name not in self._buffers:
            self._buffers[name] = self._like.new_empty(self._rows, self._like.shape[1])
        return self._buffers[name][: part.pairs.stop - part.pairs.start]


def _rows(t: Tensor, part: Part, out: Tensor | None) -> Tensor:
    """The part's rows of `[tokens, f]`; not to be written to, as they may be `t` itself."""
    return t if part.token is None else torch.index_select(t, 0, part.token, out=out)


def _times_transposed(rows: Tensor, rank: Tensor) -> Tensor:
    """`rows @ rank.T`, `[n, f] x [r, f]`; on a CPU the product is faster the other way around."""
    return (rank @ rows.T).T


def _sum(total: Tensor, part: Part, value: Tensor) -> Tensor:
    """`total` and the part's rows; may write into `total`, but not where a compiler traces.

    PyTorch 2.11 compiles a function whose result was written to in place into one with wrong gradients (its issue
    180642).
    """
    return total + value if part.token is None else total.index_add_(0, part.token, value)


def _grad_of_weighted_hidden(
    part: Part,
    d_mixed: Tensor,
    d_low: Tensor,
    rank_down: Tensor,
    hidden_mask: Tensor | None,
    down_mask: Tensor | None,
    buffers: _Buffers,
) -> Tensor:
    """q, the gradient of `w_k h_k`: through the mix and through the low-rank down projection."""
    rank = rank_down[part.columns]
    if down_mask is None:
        if part.token is None:
            q = torch.addmm(d_mixed, d_low, rank)
        else:
            q = torch.index_select(d_mixed, 0, part.token, out=buffers("q", part)).addmm_(d_low, rank)
    else:
        q = torch.mm(d_low, rank, out=buffers("q", part))
        q *= _rows(down_mask, part, buffers("product", part))
        q += _rows(d_mixed, part, buffers("product", part))
    if hidden_mask is not None:
        q *= _rows(hidden_mask, part, buffers("product", part))
    return q


def _dropped(
    hidden: Tensor, part: Part, hidden_mask: Tensor | None, down_mask: Tensor | None, buffers: _Buffers
) -> Tensor:
    """h_k as the low-rank down projection sees it."""
    for mask in (hidden_mask, down_mask):
        if mask is not None:
            rows = _rows(mask, part, buffers("product", part))
            hidden = torch.mul(hidden, rows, out=buffers("dropped", part))
    return hidden
