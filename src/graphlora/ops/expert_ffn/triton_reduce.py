"""Adds the partial sums that the kernels of the expert FFN write, in a fixed order."""

from __future__ import annotations

import triton
import triton.language as tl


@triton.jit
def _chosen(weights, ids, t, live, column, columns, scaling, r: tl.constexpr, K: tl.constexpr):
    """Of rows t and columns of `[T, N r]`: whether the expert was selected, its slot, s times its weight."""
    expert = column // r
    slot = tl.zeros((t.shape[0], column.shape[0]), tl.int32)
    chosen = tl.zeros((t.shape[0], column.shape[0]), tl.int1)
    factor = tl.zeros((t.shape[0], column.shape[0]), tl.float32)
    for k in tl.static_range(K):
        choice = tl.load(ids + t * K + k, mask=live, other=-1).to(tl.int32)
        slot += (choice[:, None] < expert[None, :]).to(tl.int32)
        hit = choice[:, None] == expert[None, :]
        chosen = chosen | hit
        w = tl.load(weights + t * K + k, mask=live, other=0.0).to(tl.float32)
        factor += tl.where(hit, (scaling * w)[:, None], 0.0)
    return chosen & live[:, None] & (column < columns)[None, :], slot, factor


@triton.jit(do_not_specialize=["T", "splits"])
def reduce_low_kernel(
    partial_low, weights, ids, out, T, columns, splits, scaling,
    K: tl.constexpr, r: tl.constexpr, BT: tl.constexpr, BC: tl.constexpr,
):  # fmt: skip
    """`P = s w p`, `[T, N r]`, zero for experts not selected; adds the splits of `partial_low` in order.

    Grid: (token blocks, blocks of the N r columns).
    """
    t = tl.program_id(0) * BT + tl.arange(0, BT)
    column = tl.program_id(1) * BC + tl.arange(0, BC)
    live = t < T
    chosen, slot, factor = _chosen(weights, ids, t, live, column, columns, scaling, r, K)
    total = tl.zeros((BT, BC), tl.float32)
    for split in range(0, splits):
        place = ((split * T + t)[:, None] * K + slot).to(tl.int64) * r + (column % r)[None, :]
        total += tl.load(partial_low + place, mask=chosen, other=0.0)
    at = t.to(tl.int64)[:, None] * columns + column[None, :]
    tl.store(
        out + at, (factor * total).to(out.dtype.element_ty), mask=live[:, None] & (column < columns)[None, :]
    )


@triton.jit(do_not_specialize=["T", "splits", "chunks", "low_rows", "low_columns"])
def reduce_backward_kernel(
    partial_low, partial_weight, weights, ids, d_low, d_weights,
    partial, chunk_start, chunk_end, chunk_experts, d_gate_B, d_up_B, d_down_A,
    T, columns, splits, scaling, f, chunks, low_rows, low_columns, table_blocks,
    K: tl.constexpr, N: tl.constexpr, r: tl.constexpr, R: tl.constexpr, SLOTS: tl.constexpr,
    BT: tl.constexpr, BC: tl.constexpr, BF: tl.constexpr,
):  # fmt: skip
    """All that backward adds up: the low-rank inputs and routing weights by split, the tables by chunk.

    The first `low_rows * low_columns` programs do the one, `table_blocks * N` programs the other.
    """
    block = tl.program_id(0)
    of_tables = block - low_rows * low_columns
    if of_tables < 0:
        _reduce_tokens(
            block % low_rows, block // low_rows, partial_low, partial_weight, weights, ids, d_low, d_weights,
            T, columns, splits, scaling, K, r, BT, BC,
        )  # fmt: skip
    else:
        _reduce_tables(
            of_tables % table_blocks, of_tables // table_blocks, partial, chunk_start, chunk_end, chunk_experts,
            d_gate_B, d_up_B, d_down_A, f, chunks, N, r, R, SLOTS, BF,
        )  # fmt: skip


@triton.jit
def _reduce_tokens(
    row_block, column_block, partial_low, partial_weight, weights, ids, d_low, d_weights, T, columns, splits, scaling,
    K: tl.constexpr, r: tl.constexpr, BT: tl.constexpr, BC: tl.constexpr,
):  # fmt: skip
    """`d_low` `[T, 2 N r]` of gate and up, zero for experts not selected, and `d_weights` `[T, K]`."""
    t = row_block * BT + tl.arange(0, BT)
    column = column_block * BC + tl.arange(0, BC)
    live = t < T
    chosen, slot, factor = _chosen(weights, ids, t, live, column, columns, scaling, r, K)
    of_gate = tl.zeros((BT, BC), tl.float32)
    of_up = tl.zeros((BT, BC), tl.float32)
    for split in range(0, splits):
        place = ((split * T + t)[:, None] * K + slot).to(tl.int64) * (2 * r) + (column % r)[None, :]
        of_gate += tl.load(partial_low + place, mask=chosen, other=0.0)
        of_up += tl.load(partial_low + place + r, mask=chosen, other=0.0)
    at = t.to(tl.int64)[:, None] * (2 * columns) + column[None, :]
    inside = live[:, None] & (column < columns)[None, :]
    tl.store(d_low + at, (factor * of_gate).to(d_low.dtype.element_ty), mask=inside)
    tl.store(d_low + columns + at, (factor * of_up).to(d_low.dtype.element_ty), mask=inside)
    if column_block == 0:
        for k in tl.static_range(K):
            mine = tl.load(ids + t * K + k, mask=live, other=-1)
            place_of = tl.zeros((BT,), tl.int32)
            for j in tl.static_range(K):
                place_of += (tl.load(ids + t * K + j, mask=live, other=-1) < mine).to(tl.int32)
            total = tl.zeros((BT,), tl.float32)
            for split in range(0, splits):
                total += tl.load(partial_weight + (split * T + t) * K + place_of, mask=live, other=0.0)
            tl.store(d_weights + t * K + k, total, mask=live)


@triton.jit
def _reduce_tables(
    row_block, e, partial, chunk_start, chunk_end, chunk_experts, d_gate_B, d_up_B, d_down_A, f, chunks,
    N: tl.constexpr, r: tl.constexpr, R: tl.constexpr, SLOTS: tl.constexpr, BF: tl.constexpr,
):  # fmt: skip
    """Adds the chunks of `weight_gradient_kernel`, in order, of expert e."""
    c = row_block * BF + tl.arange(0, BF)
    lane = tl.arange(0, R)
    table = (c < f)[:, None] & (lane < r)[None, :]
    sum_gate = tl.zeros((BF, R), tl.float32)
    sum_up = tl.zeros((BF, R), tl.float32)
    sum_down = tl.zeros((BF, R), tl.float32)
    at = partial + c[:, None] * r + lane[None, :]
    here = tl.zeros((BF, R), tl.int32) + e
    for chunk in range(0, chunks):
        filled = tl.load(chunk_start + chunk) < tl.load(chunk_end + chunk)
        for k in tl.static_range(SLOTS):
            mine = table & (here == tl.where(filled, tl.load(chunk_experts + chunk * N + k), -1))
            sum_gate += tl.load(at, mask=mine, other=0.0)
            sum_up += tl.load(at + f * r, mask=mine, other=0.0)
            sum_down += tl.load(at + 2 * f * r, mask=mine, other=0.0)
            at += 3 * f * r
    out = e * f * r + c[:, None] * r + lane[None, :]
    tl.store(d_gate_B + out, sum_gate.to(d_gate_B.dtype.element_ty), mask=table)
    tl.store(d_up_B + out, sum_up.to(d_up_B.dtype.element_ty), mask=table)
    tl.store(
        d_down_A + (e * r + lane)[None, :] * f + c[:, None],
        sum_down.to(d_down_A.dtype.element_ty),
        mask=table,
    )
