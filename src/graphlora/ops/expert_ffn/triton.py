"""The expert FFN in fused kernels: one pass over `[tokens, f]` forward, two backward.

Same functions as `torch.py`. `ExpertMix` computes `m` and `P` from the frozen products; README.md has the formulas.
The big products stay with cuBLAS. Where the frozen projections are plain matrices, `ExpertMix` also applies them, so
that backward adds the three gradients of x inside the products instead of after them.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from graphlora.errors import GraphLoraError
from graphlora.ops.expert_ffn import triton_launch  # noqa: F401 - registers the operations
from graphlora.ops.expert_ffn.inputs import ExpertWeights, FrozenFfn, LoraMasks, masked
from graphlora.ops.expert_ffn.recompute import maybe_recompute
from graphlora.ops.expert_ffn.support import unsupported

_DTYPES = (torch.float32, torch.float16, torch.bfloat16)


def expert_ffn_triton(
    x: Tensor,
    ffn: FrozenFfn,
    experts: ExpertWeights,
    top_k_weights: Tensor,
    top_k_index: Tensor,
    scaling: float,
    masks: LoraMasks,
    dropout: float = 0.0,
    recompute_gate_up: bool = False,
) -> Tensor:
    """Same function as `expert_ffn_eager` (see there), for gated blocks.

    Args:
        x: `[tokens, d]`, float32, float16 or bfloat16.
        ffn: the frozen block; its activation is one of `support.ACTIVATIONS`.
        experts: stacked low-rank pairs, in any floating-point dtype; products run in the dtype of `x`.
        top_k_weights: `[tokens, top_k]`.
        top_k_index: `[tokens, top_k]`.
        scaling: s = lora_alpha / r.
        masks: dropout masks of the inputs of gate and up; `down` and `hidden` must be None.
        dropout: probability of the dropout between activation and `down_A`, drawn in the kernel.
        recompute_gate_up: run the frozen gate and up projections again in backward instead of saving what they give.

    Raises:
        GraphLoraError: for sizes, dtypes or activations that the kernels do not support.
    """
    _check(x, ffn, experts, top_k_index, masks)
    seed = torch.randint(2**31 - 1, (1,), device=x.device, dtype=torch.int32) if dropout else None

    def mix(x: Tensor, weights: Tensor) -> tuple[Tensor, Tensor]:
        plain = None if ffn.plain_weights is None else ffn.plain_weights(x)
        gate, up = (None, None) if plain is not None else ffn.project_in(x)
        return ExpertMix.apply(
            x, gate, up, *(plain or (None, None)),
            experts.gate_A, experts.gate_B, experts.up_A, experts.up_B, experts.down_A,
            weights, top_k_index, masks.gate, masks.up, seed, dropout, scaling, ffn.act.name,
        )  # fmt: skip

    mixed, low_down = maybe_recompute(recompute_gate_up, mix, x, top_k_weights)
    return AddLowRank.apply(ffn.project_out(mixed), low_down, experts.down_B)


def _check(x: Tensor, ffn: FrozenFfn, experts: ExpertWeights, top_k_index: Tensor, masks: LoraMasks) -> None:
    num_experts, r, _ = experts.down_A.shape
    problem = unsupported(
        experts.gate_B is not None,
        ffn.act.name or type(ffn.act.act).__name__,
        num_experts,
        top_k_index.shape[1],
        r,
        masks.hidden is not None,
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
        gate_A: Tensor,
        gate_B: Tensor,
        up_A: Tensor,
        up_B: Tensor,
        down_A: Tensor,
        top_k_weights: Tensor,
        top_k_index: Tensor,
        gate_mask: Tensor | None,
        up_mask: Tensor | None,
        seed: Tensor | None,
        dropout: float,
        scaling: float,
        act: str,
    ) -> tuple[Tensor, Tensor]:
        """Args: as `expert_ffn_triton`'s; either `gate` and `up`, `[tokens, f]`, or the two frozen weights."""
        plain = gate is None
        low_A, b_gate, b_up, a_down = _cast_weights(x.dtype, gate_A, up_A, gate_B, up_B, down_A)
        if gate_weight is not None and up_weight is not None:
            gate, up = x @ gate_weight.T, x @ up_weight.T
        assert gate is not None
        assert up is not None
        half = len(low_A) // 2
        if up_mask is None:
            low_gate, low_up = (x @ low_A.T).split(half, dim=1)
        else:
            low_gate, low_up = masked(x, gate_mask) @ low_A[:half].T, masked(x, up_mask) @ low_A[half:].T
        mixed, low_down, plan = torch.ops.graphlora.expert_mix_forward(
            gate,
            up,
            low_gate,
            low_up,
            b_gate,
            b_up,
            a_down,
            top_k_weights,
            top_k_index,
            seed,
            dropout,
            scaling,
            act,
        )
        ctx.save_for_backward(
            x, gate, up, gate_weight, up_weight, low_A, low_gate, low_up, b_gate, b_up, a_down,
            top_k_weights, top_k_index, gate_mask, up_mask, seed, plan,
        )  # fmt: skip
        ctx.plain, ctx.constants = plain, (dropout, scaling, act)
        ctx.dtypes = [t.dtype for t in (gate_A, gate_B, up_A, up_B, down_A)]
        return mixed, low_down

    @staticmethod
    def backward(ctx: Any, *grad_outputs: Tensor) -> tuple[Tensor | None, ...]:
        """Gradients in the order of `forward`'s arguments."""
        (
            x, gate, up, gate_weight, up_weight, low_A, low_gate, low_up, b_gate, b_up, a_down,
            top_k_weights, top_k_index, gate_mask, up_mask, seed, plan,
        ) = ctx.saved_tensors  # fmt: skip
        d_mixed, d_low_down = grad_outputs
        d_gate, d_up, d_low, d_gate_B, d_up_B, d_down_A, d_weights = torch.ops.graphlora.expert_mix_backward(
            d_mixed, d_low_down, gate, up, low_gate, low_up, b_gate, b_up, a_down,
            top_k_weights, top_k_index, seed, plan, *ctx.constants,
        )  # fmt: skip
        half = len(low_A) // 2
        d_low_gate, d_low_up = d_low.split(half, dim=1)
        dx = None
        if ctx.needs_input_grad[0]:
            if up_mask is None:
                dx = d_low @ low_A
            else:
                dx = masked(d_low_gate @ low_A[:half], gate_mask) + masked(d_low_up @ low_A[half:], up_mask)
            if ctx.plain:
                dx.addmm_(d_gate, gate_weight).addmm_(d_up, up_weight)
        if up_mask is None:
            d_gate_A, d_up_A = _product_float32(d_low.T, x).split(half, dim=0)
        else:
            d_gate_A = _product_float32(d_low_gate.T, masked(x, gate_mask))
            d_up_A = _product_float32(d_low_up.T, masked(x, up_mask))
        shape = (*a_down.shape[:2], x.shape[1])
        grads = (d_gate_A.view(shape), d_gate_B, d_up_A.view(shape), d_up_B, d_down_A)
        d_base = (None, None) if ctx.plain else (d_gate, d_up)
        return (
            dx, *d_base, None, None, *(g.to(dtype) for g, dtype in zip(grads, ctx.dtypes, strict=True)),
            d_weights.to(top_k_weights.dtype), *(None,) * 7,
        )  # fmt: skip


class AddLowRank(torch.autograd.Function):
    """`out + P B_down`, in place on the frozen product, with the gradients of P and B_down."""

    @staticmethod
    def forward(ctx: Any, out: Tensor, low_down: Tensor, down_B: Tensor) -> Tensor:
        """Args: `[tokens, d]`, P `[tokens, N r]`, `[N, d, r]`."""
        num_experts, d, r = down_B.shape
        rank = down_B.new_empty(num_experts, r, d, dtype=low_down.dtype).copy_(down_B.transpose(1, 2))
        ctx.save_for_backward(low_down, rank)
        ctx.dtype = down_B.dtype
        if out.dtype != low_down.dtype:
            return out + low_down @ rank.flatten(0, 1)
        return torch.addmm(out, low_down, rank.flatten(0, 1))

    @staticmethod
    def backward(ctx: Any, *grad_outputs: Tensor) -> tuple[Tensor | None, ...]:
        """Gradients of out, P and B_down."""
        low_down, rank = ctx.saved_tensors
        grad = grad_outputs[0].to(low_down.dtype)
        d_rank = _product_float32(low_down.T, grad).view(rank.shape)
        return grad_outputs[0], grad @ rank.flatten(0, 1).T, d_rank.transpose(1, 2).to(ctx.dtype)


def _cast_weights(
    dtype: torch.dtype, gate_A: Tensor, up_A: Tensor, gate_B: Tensor, up_B: Tensor, down_A: Tensor
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """`[gate_A; up_A]` as one matrix, and the other three, in `dtype`: one launch for all."""
    d = gate_A.shape[2]
    low = gate_A.new_empty(2 * gate_A.shape[0] * gate_A.shape[1], d, dtype=dtype)
    half = len(low) // 2
    others = [
        torch.empty_like(t, dtype=dtype, memory_format=torch.contiguous_format)
        for t in (gate_B, up_B, down_A)
    ]
    torch._foreach_copy_(
        [low[:half], low[half:], *others], [gate_A.flatten(0, 1), up_A.flatten(0, 1), gate_B, up_B, down_A]
    )
    return low, others[0], others[1], others[2]


def _product_float32(a: Tensor, b: Tensor) -> Tensor:
    """`a @ b`, accumulated and returned in float32 where the device can do that in one product."""
    if a.dtype == torch.float32 or a.device.type != "cuda" or not _HAS_OUT_DTYPE:
        return (a @ b).float()
    return torch.mm(a, b, out_dtype=torch.float32)


_HAS_OUT_DTYPE = tuple(int(part) for part in torch.__version__.split(".")[:2]) >= (2, 8)
