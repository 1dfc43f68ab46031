"""What the kernels of the expert FFN need before they run, in one launch: the plan, matrices in their dtype."""

from __future__ import annotations

from typing import NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor

from graphlora.ops.expert_ffn.triton_plan import SORT_BLOCK, PlanShape, make_plan, plan_constants, sort_block
from graphlora.ops.sizes import ceil_div, next_power_of_2
from graphlora.ops.triton_rounding import narrowed

_COPY_BLOCK, _TURN_BLOCK = 8192, 256


class Prepared(NamedTuple):
    """Copies in the dtype of the products, and the plan.

    Attributes:
        low: `A x` of gate and up, `[tokens, 2 N r]`, rounded; or, where that is yet to be computed, both A,
            `[2 N r, d]`.
        gate_B: `[N, f, r]`.
        up_B: likewise.
        down_A: `[N, r, f]`.
        rank: `down_B` as the product with P takes it, `[N r, d]`.
        plan: see `triton_plan.py`.
    """

    low: Tensor
    gate_B: Tensor
    up_B: Tensor
    down_A: Tensor
    rank: Tensor
    plan: Tensor


def prepare(
    first: Tensor, second: Tensor | None, gate_B: Tensor, up_B: Tensor, down_A: Tensor, down_B: Tensor,
    top_k_weights: Tensor, top_k_index: Tensor, shape: PlanShape, dtype: torch.dtype,
) -> Prepared:  # fmt: skip
    """One launch where the plan is uniform.

    Args:
        first: `A x` of gate and up, `[tokens, 2 N r]`, rows of any stride; or the gate's A, `[N, r, d]`.
        second: the up projection's A where `first` is the gate's; else None.
        gate_B: `[N, f, r]`, in any floating dtype, as all weights.
        up_B: likewise.
        down_A: `[N, r, f]`.
        down_B: `[N, d, r]`.
        top_k_weights: `[tokens, K]`, contiguous.
        top_k_index: likewise.
        shape: sizes of the plan.
        dtype: of the copies.
    """
    num_experts, d, r = down_B.shape
    if second is not None:
        first, second = first.contiguous().flatten(0, 1), second.contiguous().flatten(0, 1)
    gate_B, up_B, down_A, down_B = (t.contiguous() for t in (gate_B, up_B, down_A, down_B))
    found = empty_prepared(first, second, gate_B, up_B, down_A, down_B, shape, dtype)
    if shape.rows == 0:
        return found
    sorted_here = ceil_div(shape.rows, SORT_BLOCK) if shape.uniform else 0
    if not shape.uniform:
        found = found._replace(plan=make_plan(top_k_index, top_k_weights, shape))
    blocks = [
        sorted_here,
        ceil_div(first.numel(), _COPY_BLOCK),
        0 if second is None else ceil_div(second.numel(), _COPY_BLOCK),
        *[ceil_div(down_A.numel(), _COPY_BLOCK)] * 3,
        num_experts * ceil_div(d, _TURN_BLOCK),
    ]
    ends = [sum(blocks[: i + 1]) for i in range(len(blocks))]
    prepare_kernel[(ends[-1],)](
        top_k_index, top_k_weights, *shape.parts(found.plan),
        first, first if second is None else second, found.low, found.low[len(first) :],
        gate_B, found.gate_B, up_B, found.up_B, down_A, found.down_A, down_B, found.rank,
        shape.rows, shape.tiles, shape.tiles + shape.chunks, *ends[:-1],
        first.numel(), first.stride(0), down_A.numel(), d,
        COLUMNS=first.shape[1],
        r=r, R=next_power_of_2(r), COPY=_COPY_BLOCK, TURN=_TURN_BLOCK, UNIFORM=shape.uniform,
        num_warps=8, **plan_constants(shape),
    )  # fmt: skip
    return found


def empty_prepared(
    first: Tensor, second: Tensor | None, gate_B: Tensor, up_B: Tensor, down_A: Tensor, down_B: Tensor,
    shape: PlanShape, dtype: torch.dtype,
) -> Prepared:  # fmt: skip
    """Room for what `prepare` gives."""
    num_experts, d, r = down_B.shape
    sizes = [
        first.shape if second is None else (2 * num_experts * r, d),
        gate_B.shape, up_B.shape, down_A.shape, (num_experts * r, d),
    ]  # fmt: skip
    copies = [torch.empty(size, dtype=dtype, device=down_B.device) for size in sizes]
    rows = shape.numel if shape.rows else 0
    return Prepared(*copies, torch.empty(rows, dtype=torch.int32, device=down_B.device))


@triton.jit
def _copy(block, source, target, size, COPY: tl.constexpr):
    at = block * COPY + tl.arange(0, COPY)
    value = tl.load(source + at, mask=at < size, other=0.0).to(tl.float32)
    tl.store(target + at, narrowed(value, target.dtype.element_ty), mask=at < size)


@triton.jit
def _copy_rows(block, source, target, size, stride, COLUMNS: tl.constexpr, COPY: tl.constexpr):
    at = block * COPY + tl.arange(0, COPY)
    value = tl.load(source + (at // COLUMNS) * stride + at % COLUMNS, mask=at < size, other=0.0)
    tl.store(target + at, narrowed(value.to(tl.float32), target.dtype.element_ty), mask=at < size)


@triton.jit
def _turn(block, source, target, d, r: tl.constexpr, R: tl.constexpr, TURN: tl.constexpr):
    """`[N, d, r]` to `[N r, d]`, TURN columns of one expert."""
    blocks = tl.cdiv(d, TURN)
    expert = block // blocks
    column = (block % blocks) * TURN + tl.arange(0, TURN)
    lane = tl.arange(0, R)
    live = (column < d)[:, None] & (lane < r)[None, :]
    value = tl.load(source + (expert * d + column)[:, None] * r + lane[None, :], mask=live, other=0.0)
    value = narrowed(value.to(tl.float32), target.dtype.element_ty)
    tl.store(target + (expert * r + lane)[None, :] * d + column[:, None], value, mask=live)


@triton.jit(
    do_not_specialize=["T", "tiles", "pieces", "sorted_to", "first_to", "second_to", "gate_to", "up_to"]
)
def prepare_kernel(
    ids, weights, order, sorted_weights, start_ptr, end_ptr, count_ptr, experts_ptr,
    first, second, first_out, second_out, gate_B, gate_out, up_B, up_out, down_A, down_out, down_B, rank,
    T, tiles, pieces, sorted_to, first_to, second_to, gate_to, up_to, down_to,
    first_size, first_stride, table_size, d,
    K: tl.constexpr, N: tl.constexpr, NP: tl.constexpr, SP: tl.constexpr, BLOCK: tl.constexpr,
    COUNTED: tl.constexpr, TILE: tl.constexpr, CHUNK: tl.constexpr, UNIFORM: tl.constexpr,
    COLUMNS: tl.constexpr, r: tl.constexpr, R: tl.constexpr, COPY: tl.constexpr, TURN: tl.constexpr,
):  # fmt: skip
    """Sorts rows and copies matrices, each by its own programs; the numbers `*_to` say where one's end."""
    block = tl.program_id(0)
    if block < sorted_to:
        if UNIFORM:
            sort_block(
                block, ids, weights, order, sorted_weights, start_ptr, end_ptr, count_ptr, experts_ptr,
                T, sorted_to, tiles, pieces, K, N, NP, SP, BLOCK, COUNTED, TILE, CHUNK,
            )  # fmt: skip
    elif block < first_to:
        _copy_rows(block - sorted_to, first, first_out, first_size, first_stride, COLUMNS, COPY)
    elif block < second_to:
        _copy_rows(block - first_to, second, second_out, first_size, first_stride, COLUMNS, COPY)
    elif block < gate_to:
        _copy(block - second_to, gate_B, gate_out, table_size, COPY)
    elif block < up_to:
        _copy(block - gate_to, up_B, up_out, table_size, COPY)
    elif block < down_to:
        _copy(block - up_to, down_A, down_out, table_size, COPY)
    else:
        _turn(block - down_to, down_B, rank, d, r, R, TURN)
