"""The expert FFN in fused kernels: one pass over `[tokens, f]` forward, two backward.

Same functions as `torch.py`. `ExpertMix` computes `m` and `P` (README.md has the formulas). The big products stay with
cuBLAS; where the frozen projections are plain matrices they are made here, so that the low-rank parts, and the
gradients of x, are added inside products instead of after them.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
from torch import Tensor

from graphlora.errors import GraphLoraError
from graphlora.ops.dropout.triton import add_dropped_product, draw_seed, dropped
from graphlora.ops.expert_ffn import triton_launch
from graphlora.ops.expert_ffn.inputs import ExpertWeights, FrozenFfn
from graphlora.ops.expert_ffn.joined import joined
from graphlora.ops.expert_ffn.recompute import maybe_recompute
from graphlora.ops.expert_ffn.support import unsupported
from graphlora.ops.expert_ffn.triton_prepare import Prepared
from graphlora.ops.operations import operation
from graphlora.ops.products import product_float32, sum_of_products

_DTYPES = (torch.float32, torch.float16, torch.bfloat16)


class _Settings(NamedTuple):
    """What is constant; `columns` is where the hash of the input's mask begins to count, after those of f."""

    dropout: float
    scaling: float
    act: str
    columns: int


def expert_ffn_triton(
    x: Tensor,
    ffn: FrozenFfn,
    experts: ExpertWeights,
    top_k_weights: Tensor,
    top_k_index: Tensor,
    scaling: float,
    dropout: float = 0.0,
    recompute_gate_up: bool = False,
    low: Tensor | None = None,
) -> Tensor:
    """Same function as `expert_ffn_eager` (see there), for gated blocks.

    Args:
        x: `[tokens, d]`, float32, float16 or bfloat16.
        ffn: the frozen block; its activation is one of `support.ACTIVATIONS`.
        experts: stacked low-rank pairs, in any floating-point dtype; products run in the dtype of `x`.
        top_k_weights: `[tokens, top_k]`.
        top_k_index: `[tokens, top_k]`.
        scaling: s = lora_alpha / r.
        dropout: probability of the dropout of the low-rank branches' inputs, drawn in the kernels: one mask for gate
            and up, which have the same input, and one between activation and `down_A`.
        recompute_gate_up: run the frozen gate and up projections again in backward instead of saving what they give.
        low: `x [gate_A; up_A]^T`, `[tokens, 2 N r]`, where that was computed elsewhere; the gradients of x and of both
            A through it then belong there. Not with dropout.

    Raises:
        GraphLoraError: for sizes, dtypes or activations that the kernels do not support.
    """
    _check(x, ffn, experts, top_k_index)
    assert low is None or not dropout
    seed = draw_seed(x.device) if dropout else None
    settings = _Settings(dropout, scaling, ffn.act.name or "", experts.up_B.shape[1])
    with torch.no_grad():
        first, second = (experts.gate_A, experts.up_A) if low is None else (low, None)
        prepare = operation("expert_mix_prepare", triton_launch.mix_prepare, experts.gate_B)
        made = prepare(
            first, second, *(experts.gate_B, experts.up_B, experts.down_A, experts.down_B),
            top_k_weights, top_k_index, x.dtype,
        )  # fmt: skip
    prepared = Prepared(*made)

    def mix(x: Tensor, low: Tensor | None, weights: Tensor) -> tuple[Tensor, Tensor]:
        plain = None if ffn.plain_weights is None else ffn.plain_weights(x)
        gate, up = (None, None) if plain is not None else ffn.project_in(x)
        own = (None, None) if low is not None else (experts.gate_A, experts.up_A)
        return ExpertMix.apply(
            x, gate, up, *(plain or (None, None)), low, *own, experts.gate_B, experts.up_B, experts.down_A,
            weights, top_k_index, seed, *prepared[:4], prepared.plan, settings,
        )  # fmt: skip

    mixed, low_down = maybe_recompute(recompute_gate_up, mix, x, low, top_k_weights)
    down = None if ffn.plain_down is None else ffn.plain_down(mixed)
    if down is not None:
        return DownProjection.apply(mixed, down, low_down, experts.down_B, prepared.rank)
    return AddLowRank.apply(ffn.project_out(mixed), low_down, experts.down_B, prepared.rank)


def _check(x: Tensor, ffn: FrozenFfn, experts: ExpertWeights, top_k_index: Tensor) -> None:
    num_experts, r, _ = experts.down_A.shape
    problem = unsupported(
        experts.gate_B is not None,
        ffn.act.name or type(ffn.act.act).__name__,
        num_experts,
        top_k_index.shape[1],
        r,
        False,
    )
    if problem is None and x.dtype not in _DTYPES:
        problem = f"{x.dtype}"
    if problem is not None:
        raise GraphLoraError(f"the Triton kernels do not support {problem}; use backend='torch'.")


class ExpertMix(torch.autograd.Function):
    """`(m, P)` of the selected experts, from x and the frozen products (or their weights). First-order only."""

    @staticmethod
    def forward(
        ctx: Any,
        x: Tensor,
        gate: Tensor | None,
        up: Tensor | None,
        gate_weight: Tensor | None,
        up_weight: Tensor | None,
        low: Tensor | None,
        gate_A: Tensor | None,
        up_A: Tensor | None,
        gate_B: Tensor,
        up_B: Tensor,
        down_A: Tensor,
        top_k_weights: Tensor,
        top_k_index: Tensor,
        seed: Tensor | None,
        low_or_A: Tensor,
        b_gate: Tensor,
        b_up: Tensor,
        a_down: Tensor,
        plan: Tensor,
        settings: _Settings,
    ) -> tuple[Tensor, Tensor]:
        """Args: as `expert_ffn_triton`'s; either `gate` and `up`, `[tokens, f]`, or the two frozen weights.

        From `low_or_A` on they are `Prepared`'s; `low` itself is there for its gradient.
        """
        dropout, scaling, act, columns = settings
        plain = gate is None
        if gate_weight is not None and up_weight is not None:
            both = joined(gate_weight, up_weight)
            gate, up = (x @ gate_weight.T, x @ up_weight.T) if both is None else (x @ both.T).chunk(2, dim=1)
        assert gate is not None
        assert up is not None
        low_A = None
        if low is None:
            low_A = low_or_A
            low_or_A = (x if seed is None else dropped(x, seed, dropout, columns)) @ low_A.T
        low_gate, low_up = low_or_A.split(low_or_A.shape[1] // 2, dim=1)
        mix = operation("expert_mix_forward", triton_launch.mix_forward, up)
        mixed, low_down = mix(
            gate, up, low_gate, low_up, b_gate, b_up, a_down, top_k_weights, top_k_index, seed, plan,
            dropout, scaling, act,
        )  # fmt: skip
        ctx.save_for_backward(
            x, gate, up, gate_weight, up_weight, low_A, low_or_A, b_gate, b_up, a_down,
            top_k_weights, top_k_index, seed, plan,
        )  # fmt: skip
        ctx.plain, ctx.settings = plain, settings
        ctx.low_dtype = x.dtype if low is None else low.dtype
        ctx.dtypes = [None if t is None else t.dtype for t in (gate_A, up_A, gate_B, up_B, down_A)]
        return mixed, low_down

    @staticmethod
    def backward(ctx: Any, *grad_outputs: Tensor) -> tuple[Tensor | None, ...]:
        """Gradients in the order of `forward`'s arguments."""
        (
            x, gate, up, gate_weight, up_weight, low_A, low, b_gate, b_up, a_down,
            top_k_weights, top_k_index, seed, plan,
        ) = ctx.saved_tensors  # fmt: skip
        dropout, scaling, act, columns = ctx.settings
        low_gate, low_up = low.split(low.shape[1] // 2, dim=1)
        mix = operation("expert_mix_backward", triton_launch.mix_backward, up)
        both = joined(gate_weight, up_weight) if ctx.plain else None
        d_base, d_low, *d_tables, d_weights = mix(
            *grad_outputs, gate, up, low_gate, low_up, b_gate, b_up, a_down,
            top_k_weights, top_k_index, seed, plan, dropout, scaling, act, ctx.low_dtype, both is not None,
        )  # fmt: skip
        # Factors of the gradient of x through the frozen matrices, where x met them here, and through A, likewise.
        frozen: list[tuple[Tensor, Tensor]] = []
        if both is not None:
            frozen = [(d_base.flatten(1), both)]
        elif ctx.plain:
            frozen = [(d_base[0], gate_weight), (d_base[1], up_weight)]
        d_A: tuple[Tensor | None, Tensor | None] = (None, None)
        if low_A is not None:
            seen = x if seed is None else dropped(x, seed, dropout, columns)
            halves = product_float32(d_low.T, seen).split(len(low_A) // 2, dim=0)
            d_A = halves[0].view(*a_down.shape[:2], -1), halves[1].view(*a_down.shape[:2], -1)
        dx = None
        if ctx.needs_input_grad[0]:
            low_rank = None if low_A is None else (d_low, low_A)
            dx = _input_gradient(frozen, low_rank, seed, dropout, columns)
        grads = zip((*d_A, *d_tables), ctx.dtypes, strict=True)
        return (
            dx, *((None, None) if ctx.plain else d_base.unbind()), None, None, None if low_A is not None else d_low,
            *(None if g is None else g.to(dtype) for g, dtype in grads),
            d_weights.to(top_k_weights.dtype), *(None,) * 8,
        )  # fmt: skip


def _input_gradient(
    frozen: list[tuple[Tensor, Tensor]],
    low_rank: tuple[Tensor, Tensor] | None,
    seed: Tensor | None,
    dropout: float,
    columns: int,
) -> Tensor | None:
    """The sum of all products of factors; what dropout hid from A passes no gradient through it."""
    if seed is None or low_rank is None:
        factors = frozen if low_rank is None else [*frozen, low_rank]
        return sum_of_products(*zip(*factors, strict=True)) if factors else None
    if not frozen:
        return dropped(low_rank[0] @ low_rank[1], seed, dropout, columns)
    total = sum_of_products(*zip(*frozen, strict=True))
    return add_dropped_product(total, *low_rank, seed, dropout, columns)


class DownProjection(torch.autograd.Function):
    """`m W_down^T + P B_down`, for a plain frozen matrix; the second product adds to the first in place."""

    @staticmethod
    def forward(
        ctx: Any, mixed: Tensor, weight: Tensor, low_down: Tensor, down_B: Tensor, rank: Tensor
    ) -> Tensor:
        """Args: `[tokens, f]`, `[d, f]`, P `[tokens, N r]`, `[N, d, r]`, and that as `Prepared` has it."""
        ctx.save_for_backward(weight, low_down, rank)
        ctx.dtype, ctx.num_experts = down_B.dtype, len(down_B)
        return sum_of_products((mixed, low_down), (weight.T, rank))

    @staticmethod
    def backward(ctx: Any, *grad_outputs: Tensor) -> tuple[Tensor | None, ...]:
        """Gradients of m, P and B_down."""
        weight, low_down, rank = ctx.saved_tensors
        grad = grad_outputs[0]
        d_down_B = _down_gradient(low_down, grad, ctx.num_experts).to(ctx.dtype)
        return grad @ weight, None, grad @ rank.T, d_down_B, None


class AddLowRank(torch.autograd.Function):
    """`out + P B_down`, with the gradients of P and B_down."""

    @staticmethod
    def forward(ctx: Any, out: Tensor, low_down: Tensor, down_B: Tensor, rank: Tensor) -> Tensor:
        """Args: `[tokens, d]`, P `[tokens, N r]`, `[N, d, r]`, and that as `Prepared` has it."""
        ctx.save_for_backward(low_down, rank)
        ctx.dtype, ctx.num_experts = down_B.dtype, len(down_B)
        if out.dtype != low_down.dtype:
            return out + low_down @ rank
        return torch.addmm(out, low_down, rank)

    @staticmethod
    def backward(ctx: Any, *grad_outputs: Tensor) -> tuple[Tensor | None, ...]:
        """Gradients of out, P and B_down."""
        low_down, rank = ctx.saved_tensors
        grad = grad_outputs[0].to(low_down.dtype)
        d_down_B = _down_gradient(low_down, grad, ctx.num_experts).to(ctx.dtype)
        return grad_outputs[0], grad @ rank.T, d_down_B, None


def _down_gradient(low_down: Tensor, grad: Tensor, num_experts: int) -> Tensor:
    """`[N, d, r]`."""
    product = product_float32(low_down.T, grad)
    return product.view(num_experts, len(product) // num_experts, -1).transpose(1, 2)
