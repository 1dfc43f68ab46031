"""The expert FFN in fused kernels: one pass over `[tokens, f]` forward, two backward.

Same functions as `torch.py`. `ExpertMix` computes `m` and `P` from the frozen products; README.md has the formulas.
The big products stay with cuBLAS. Where the frozen projections are plain matrices, `ExpertMix` also applies them, so
that backward adds the three gradients of x inside the products instead of after them.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
import triton
from torch import Tensor

from graphlora.errors import GraphLoraError
from graphlora.ops.backend import interprets_triton
from graphlora.ops.expert_ffn import triton_kernels as kernels
from graphlora.ops.expert_ffn.inputs import ExpertWeights, FrozenFfn, LoraMasks, masked
from graphlora.ops.expert_ffn.recompute import maybe_recompute
from graphlora.ops.expert_ffn.triton_plan import PlanShape, make_plan

ACTIVATIONS = ("silu", "gelu", "gelu_tanh")
MOST_EXPERTS, MOST_CHOICES, HIGHEST_RANK = 64, 8, 64
_DTYPES = (torch.float32, torch.float16, torch.bfloat16)
# Offsets are 32-bit up to here.
_INT32 = 2**31 - 1
_library = torch.library.Library("graphlora", "FRAGMENT")


class Tiles(NamedTuple):
    """Tile sizes of one kernel.

    Attributes:
        tokens: tokens per tile.
        columns: columns of f per step.
        splits: programs that share the columns of f (token-major kernels).
        warps: warps per program.
        stages: depth of software pipelining.
    """

    tokens: int
    columns: int
    splits: int
    warps: int
    stages: int


class TilePlan(NamedTuple):
    """Tile sizes of the three kernels; forward and token gradients share the tokens of a tile."""

    forward: Tiles
    token_gradient: Tiles
    weight_gradient: Tiles
    chunk: int


def tile_plan(tokens: int, f: int, r: int, dtype: torch.dtype) -> TilePlan:
    """Tile sizes that measured best on an H200 (docs/performance.md)."""
    wide = r > 16 or dtype == torch.float32
    chunk = max(256, triton.next_power_of_2(tokens) // 16)
    return TilePlan(
        forward=Tiles(64, 32 if wide else 64, 16, 4, 3),
        token_gradient=Tiles(64, 32, 16, 4, 3),
        weight_gradient=Tiles(32, 64, 1, 4, 2),
        chunk=chunk,
    )


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
        ffn: the frozen block; its activation is one of `ACTIVATIONS`.
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


def unsupported(
    gated: bool, act: str | None, num_experts: int, top_k: int, r: int, hidden_dropout: bool
) -> str | None:
    """What the kernels do not support of a block, as the end of a sentence; None where they do all."""
    if not gated:
        return "FFN blocks without a gate"
    if act not in ACTIVATIONS:
        return "this activation (they know silu, gelu and gelu_tanh)"
    if num_experts > MOST_EXPERTS or top_k > MOST_CHOICES or r > HIGHEST_RANK:
        return f"more than {MOST_EXPERTS} experts, top_k over {MOST_CHOICES} or r over {HIGHEST_RANK}"
    return "the base model's own dropout inside the FFN" if hidden_dropout else None


def _check(x: Tensor, ffn: FrozenFfn, experts: ExpertWeights, top_k_index: Tensor, masks: LoraMasks) -> None:
    num_experts, r, _ = experts.down_A.shape
    problem = unsupported(
        experts.gate_B is not None,
        ffn.act.name,
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


# --- the two operations ---------------------------------------------------------------------------------------------

_library.define(
    "expert_mix_forward(Tensor gate, Tensor up, Tensor low_gate, Tensor low_up, Tensor gate_B, Tensor up_B, "
    "Tensor down_A, Tensor top_k_weights, Tensor top_k_index, Tensor? seed, float dropout, float scaling, str act) "
    "-> (Tensor, Tensor, Tensor)"
)
_library.define(
    "expert_mix_backward(Tensor d_mixed, Tensor d_low_down, Tensor gate, Tensor up, Tensor low_gate, Tensor low_up, "
    "Tensor gate_B, Tensor up_B, Tensor down_A, Tensor top_k_weights, Tensor top_k_index, Tensor? seed, Tensor plan, "
    "float dropout, float scaling, str act) -> (Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor)"
)


class _Sizes(NamedTuple):
    """Sizes of one call, and the constants that all kernels share."""

    tokens: int
    f: int
    num_experts: int
    r: int
    top_k: int
    tiles: TilePlan
    plan: PlanShape
    constants: dict[str, Any]


def _sizes(up: Tensor, down_A: Tensor, top_k_index: Tensor, dropout: float, act: str) -> _Sizes:
    tokens, f = up.shape
    num_experts, r, _ = down_A.shape
    top_k = top_k_index.shape[1]
    tiles = tile_plan(tokens, f, r, up.dtype)
    # The interpreter's products know no bfloat16.
    precise = up.dtype == torch.float32 or interprets_triton()
    constants = {
        "K": top_k, "N": num_experts, "r": r, "R": max(16, triton.next_power_of_2(r)),
        "WIDE": tokens * f > _INT32, "ACT": act, "FAST": not precise, "PRECISE": precise,
        "DROPOUT": dropout > 0, "THRESHOLD": int(dropout * 2**32), "INVERSE": 1 / (1 - dropout),
    }  # fmt: skip
    plan = PlanShape(tokens, num_experts, top_k, tiles.forward.tokens, tiles.chunk)
    return _Sizes(tokens, f, num_experts, r, top_k, tiles, plan, constants)


def _token_major(sizes: _Sizes, tiles: Tiles) -> tuple[dict[str, Any], int, int]:
    """Constants, number of splits and column blocks per split of a token-major kernel."""
    columns = triton.cdiv(sizes.f, tiles.columns)
    blocks = triton.cdiv(columns, min(tiles.splits, columns))
    constants = sizes.constants | {
        "KP": triton.next_power_of_2(sizes.top_k), "BT": sizes.tiles.forward.tokens, "BF": tiles.columns,
        "UNIFORM": sizes.plan.uniform, "EVEN": sizes.f % (tiles.columns * blocks) == 0,
        "num_warps": tiles.warps, "num_stages": tiles.stages,
    }  # fmt: skip
    return constants, triton.cdiv(columns, blocks), blocks


def _seed_or_any(seed: Tensor | None, other: Tensor) -> Tensor:
    return other if seed is None else seed


def _forward(
    gate: Tensor, up: Tensor, low_gate: Tensor, low_up: Tensor, gate_B: Tensor, up_B: Tensor, down_A: Tensor,
    top_k_weights: Tensor, top_k_index: Tensor, seed: Tensor | None, dropout: float, scaling: float, act: str,
) -> tuple[Tensor, Tensor, Tensor]:  # fmt: skip
    sizes = _sizes(up, down_A, top_k_index, dropout, act)
    tokens, f, r, top_k = sizes.tokens, sizes.f, sizes.r, sizes.top_k
    gate, up, low_gate, low_up = (_rows(t) for t in (gate, up, low_gate, low_up))
    mixed = torch.empty(tokens, f, dtype=up.dtype, device=up.device)
    low_down = torch.empty(tokens, sizes.num_experts * r, dtype=up.dtype, device=up.device)
    if tokens == 0:
        return mixed, low_down, torch.empty(0, dtype=torch.int32, device=up.device)
    top_k_weights, top_k_index = top_k_weights.contiguous(), top_k_index.contiguous()
    plan = make_plan(top_k_index, top_k_weights, sizes.plan)
    order, sorted_weights, start, end, count, experts = sizes.plan.parts(plan)
    constants, splits, blocks = _token_major(sizes, sizes.tiles.forward)
    partial_low = torch.empty(splits, tokens, top_k, r, dtype=torch.float32, device=up.device)
    kernels.forward_kernel[(sizes.plan.tiles, splits)](
        gate, up, low_gate, low_up, gate_B, up_B, down_A, top_k_weights, top_k_index, _seed_or_any(seed, order),
        order, sorted_weights, start, end, experts, count, mixed, partial_low,
        tokens, f, gate.stride(0), up.stride(0), low_gate.stride(0), low_up.stride(0), blocks, scaling, **constants,
    )  # fmt: skip
    _reduce_low(sizes, partial_low, partial_low, top_k_weights, top_k_index, low_down, None, splits, scaling)
    return mixed, low_down, plan


def _reduce_low(
    sizes: _Sizes, partial_low: Tensor, partial_weight: Tensor, top_k_weights: Tensor, top_k_index: Tensor,
    out: Tensor, d_weights: Tensor | None, splits: int, scaling: float,
) -> None:  # fmt: skip
    columns = sizes.num_experts * sizes.r
    block = min(128, triton.next_power_of_2(columns))
    backward = d_weights is not None
    kernels.reduce_low_kernel[(triton.cdiv(sizes.tokens, 32), triton.cdiv(columns, block))](
        partial_low, partial_weight, top_k_weights, top_k_index,
        out, out[:, columns:] if backward else out, d_weights if backward else out,
        sizes.tokens, out.stride(0), splits, scaling,
        K=sizes.top_k, r=sizes.r, columns=columns, PARTS=2 if backward else 1, BT=32, BC=block,
    )  # fmt: skip


def _backward(
    d_mixed: Tensor, d_low_down: Tensor, gate: Tensor, up: Tensor, low_gate: Tensor, low_up: Tensor,
    gate_B: Tensor, up_B: Tensor, down_A: Tensor, top_k_weights: Tensor, top_k_index: Tensor, seed: Tensor | None,
    plan: Tensor, dropout: float, scaling: float, act: str,
) -> tuple[Tensor, ...]:  # fmt: skip
    sizes = _sizes(up, down_A, top_k_index, dropout, act)
    tokens, f, r, top_k = sizes.tokens, sizes.f, sizes.r, sizes.top_k
    inputs = [_rows(t) for t in (gate, up, d_mixed, low_gate, low_up, d_low_down)]
    strides = [t.stride(0) for t in inputs]
    d_gate, d_up = (torch.empty(tokens, f, dtype=up.dtype, device=up.device) for _ in range(2))
    d_low = torch.empty(tokens, 2 * sizes.num_experts * r, dtype=up.dtype, device=up.device)
    d_tables = [torch.empty(t.shape, dtype=torch.float32, device=up.device) for t in (gate_B, up_B, down_A)]
    d_weights = torch.empty(tokens, top_k, dtype=torch.float32, device=up.device)
    if tokens == 0:
        return d_gate, d_up, d_low, *(t.zero_() for t in d_tables), d_weights
    top_k_weights, top_k_index = top_k_weights.contiguous(), top_k_index.contiguous()
    tables = (gate_B, up_B, down_A, top_k_weights, top_k_index)
    order, sorted_weights, start, end, count, experts = sizes.plan.parts(plan)
    seed = _seed_or_any(seed, order)
    constants, splits, blocks = _token_major(sizes, sizes.tiles.token_gradient)
    partial_low = torch.empty(splits, tokens, top_k, 2 * r, dtype=torch.float32, device=up.device)
    partial_weight = torch.empty(splits, tokens, top_k, dtype=torch.float32, device=up.device)
    kernels.token_gradient_kernel[(sizes.plan.tiles, splits)](
        *inputs, *tables, seed, order, sorted_weights, start, end, experts, count,
        d_gate, d_up, partial_low, partial_weight,
        tokens, f, *strides, blocks, scaling, **constants,
    )  # fmt: skip
    _reduce_low(
        sizes, partial_low, partial_weight, top_k_weights, top_k_index, d_low, d_weights, splits, scaling
    )
    _weight_gradients(sizes, inputs, tables, seed, plan, d_tables, scaling)
    return d_gate, d_up, d_low, *d_tables, d_weights


def _weight_gradients(
    sizes: _Sizes, inputs: list[Tensor], tables: tuple[Tensor, ...], seed: Tensor, plan: Tensor,
    d_tables: list[Tensor], scaling: float,
) -> None:  # fmt: skip
    shape, slots = sizes.plan, sizes.top_k
    if not shape.uniform:
        # Sorted by expert, one (token, choice) pair per row.
        shape, slots = PlanShape(sizes.tokens * sizes.top_k, sizes.num_experts, 1, shape.tile, shape.chunk), 1
        plan = make_plan(tables[4].view(-1, 1), tables[3].view(-1, 1), shape)
    order, sorted_weights, start, end, _, experts = shape.parts(plan)
    start, end, experts = start[shape.tiles :], end[shape.tiles :], experts[shape.tiles * sizes.num_experts :]
    tiles = sizes.tiles.weight_gradient
    blocks = triton.cdiv(sizes.f, tiles.columns)
    partial = torch.empty(shape.chunks, slots, 3, sizes.f, sizes.r, dtype=torch.float32, device=plan.device)
    kernels.weight_gradient_kernel[(blocks, shape.chunks)](
        *inputs, *tables, seed, order, sorted_weights, start, end, experts, partial,
        sizes.f, *(t.stride(0) for t in inputs), scaling,
        **sizes.constants, SLOTS=slots, BT=tiles.tokens, BF=tiles.columns, EVEN=sizes.f % tiles.columns == 0,
        num_warps=tiles.warps, num_stages=tiles.stages,
    )  # fmt: skip
    kernels.reduce_weight_kernel[(triton.cdiv(sizes.f, 64), sizes.num_experts)](
        partial, start, end, experts, *d_tables, sizes.f, shape.chunks,
        N=sizes.num_experts, r=sizes.r, R=sizes.constants["R"], SLOTS=slots, BF=64,
    )  # fmt: skip


def _rows(t: Tensor) -> Tensor:
    """The tensor, its last dimension contiguous."""
    return t if t.stride(-1) == 1 else t.contiguous()


def _forward_fake(
    gate: Tensor, up: Tensor, low_gate: Tensor, low_up: Tensor, gate_B: Tensor, up_B: Tensor, down_A: Tensor,
    top_k_weights: Tensor, top_k_index: Tensor, seed: Tensor | None, dropout: float, scaling: float, act: str,
) -> tuple[Tensor, Tensor, Tensor]:  # fmt: skip
    sizes = _sizes(up, down_A, top_k_index, dropout, act)
    tokens, f = up.shape
    plan = up.new_empty(sizes.plan.numel if tokens else 0, dtype=torch.int32)
    return up.new_empty(tokens, f), up.new_empty(tokens, down_A.shape[0] * down_A.shape[1]), plan


def _backward_fake(
    d_mixed: Tensor, d_low_down: Tensor, gate: Tensor, up: Tensor, low_gate: Tensor, low_up: Tensor,
    gate_B: Tensor, up_B: Tensor, down_A: Tensor, top_k_weights: Tensor, top_k_index: Tensor, seed: Tensor | None,
    plan: Tensor, dropout: float, scaling: float, act: str,
) -> tuple[Tensor, ...]:  # fmt: skip
    tables = (t.new_empty(t.shape, dtype=torch.float32) for t in (gate_B, up_B, down_A))
    d_low = up.new_empty(len(up), 2 * down_A.shape[0] * down_A.shape[1])
    d_weights = up.new_empty(top_k_index.shape, dtype=torch.float32)
    return up.new_empty(up.shape), up.new_empty(up.shape), d_low, *tables, d_weights


for _device in ("CUDA", "CPU"):
    _library.impl("expert_mix_forward", _forward, _device)
    _library.impl("expert_mix_backward", _backward, _device)
torch.library.register_fake("graphlora::expert_mix_forward", _forward_fake)
torch.library.register_fake("graphlora::expert_mix_backward", _backward_fake)
