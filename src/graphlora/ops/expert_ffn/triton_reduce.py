"""Adds the partial sums that the kernels of the expert FFN write, in a fixed order."""

from __future__ import annotations

import triton
import triton.language as tl


@triton.jit(do_not_specialize=["T", "splits"])
def reduce_low_kernel(
    partial_low, partial_weight, weights, ids,
    out_0, out_1, d_weights,
    T, out_stride, splits, scaling,
    K: tl.constexpr, r: tl.constexpr, columns: tl.constexpr,
    PARTS: tl.constexpr, BT: tl.constexpr, BC: tl.constexpr,
):  # fmt: skip
    """Adds the splits of `partial_low`, in order, into dense `[T, N r]` rows that are zero for experts not selected.

    Forward (one part): `P = s w p`. Backward (two parts): `d_low_gate`, `d_low_up`, also times s w, and `d_weights`.
    Grid: (token blocks, blocks of the N r columns).
    """
    t = tl.program_id(0) * BT + tl.arange(0, BT)
    column = tl.program_id(1) * BC + tl.arange(0, BC)
    live = t < T
    expert, lane = column // r, column % r
    slot = tl.zeros((BT, BC), tl.int32)
    chosen = tl.zeros((BT, BC), tl.int1)
    factor = tl.zeros((BT, BC), tl.float32)
    for k in tl.static_range(K):
        choice = tl.load(ids + t * K + k, mask=live, other=-1).to(tl.int32)
        slot += (choice[:, None] < expert[None, :]).to(tl.int32)
        hit = choice[:, None] == expert[None, :]
        chosen = chosen | hit
        w = tl.load(weights + t * K + k, mask=live, other=0.0).to(tl.float32)
        factor += tl.where(hit, (scaling * w)[:, None], 0.0)
    chosen = chosen & live[:, None] & (column < columns)[None, :]
    sum_0 = tl.zeros((BT, BC), tl.float32)
    sum_1 = tl.zeros((BT, BC), tl.float32)
    for split in range(0, splits):
        place = ((split * T + t)[:, None] * K + slot).to(tl.int64) * (PARTS * r) + lane[None, :]
        sum_0 += tl.load(partial_low + place, mask=chosen, other=0.0)
        if PARTS == 2:
            sum_1 += tl.load(partial_low + place + r, mask=chosen, other=0.0)
    out = t.to(tl.int64)[:, None] * out_stride + column[None, :]
    inside = live[:, None] & (column < columns)[None, :]
    tl.store(out_0 + out, (factor * sum_0).to(out_0.dtype.element_ty), mask=inside)
    if PARTS == 2:
        tl.store(out_1 + out, (factor * sum_1).to(out_1.dtype.element_ty), mask=inside)
        if tl.program_id(1) == 0:
            for k in tl.static_range(K):
                mine = tl.load(ids + t * K + k, mask=live, other=-1)
                place_of = tl.zeros((BT,), tl.int32)
                for j in tl.static_range(K):
                    place_of += (tl.load(ids + t * K + j, mask=live, other=-1) < mine).to(tl.int32)
                total = tl.zeros((BT,), tl.float32)
                for split in range(0, splits):
                    total += tl.load(partial_weight + (split * T + t) * K + place_of, mask=live, other=0.0)
                tl.store(d_weights + t * K + k, total, mask=live)


@triton.jit(do_not_specialize=["chunks"])
def reduce_weight_kernel(
    partial, chunk_start, chunk_end, chunk_experts,
    d_gate_B, d_up_B, d_down_A,
    f, chunks, N: tl.constexpr, r: tl.constexpr, R: tl.constexpr, SLOTS: tl.constexpr, BF: tl.constexpr,
):  # fmt: skip
    """Adds the chunks of `weight_gradient_kernel`, in order, per expert. Grid: (f blocks, N)."""
    e = tl.program_id(1)
    c = tl.program_id(0) * BF + tl.arange(0, BF)
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
