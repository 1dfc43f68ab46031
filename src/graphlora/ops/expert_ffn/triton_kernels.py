"""Triton kernels of the expert FFN: what happens between the frozen products, once per token and FFN column.

README.md has the formulas. Tokens come sorted by the set of experts that they selected, so that a tile of tokens needs
few experts: exactly `top_k` in a uniform plan, those in the tile's list otherwise (`triton_plan.py`). Nothing is
accumulated by atomics: programs write partial sums, which `triton_reduce.py` adds in a fixed order.

Shapes: T tokens, f FFN size, N experts, K = top_k, r rank, R = r padded to a power of two of at least 16.
"""

from __future__ import annotations

import triton
import triton.language as tl

from graphlora.ops.dropout.triton import dropout_factor
from graphlora.ops.expert_ffn.triton_parts import (
    activation,
    activation_and_slope,
    dot_into,
    load_scaled,
    rank_of,
    routing_weight,
    sorted_weight,
)


@triton.jit(do_not_specialize=["T"])
def forward_kernel(
    gate, up, low_gate, low_up, gate_B, up_B, down_A, weights, ids, seed,
    token_order, sorted_weights, tile_start, tile_end, tile_experts, tile_count,
    mixed, partial_low,
    T, f, gate_stride, up_stride, low_gate_stride, low_up_stride, blocks, scaling,
    K: tl.constexpr, N: tl.constexpr, r: tl.constexpr, R: tl.constexpr, KP: tl.constexpr,
    BT: tl.constexpr, BF: tl.constexpr, UNIFORM: tl.constexpr, EVEN: tl.constexpr, WIDE: tl.constexpr,
    ACT: tl.constexpr, FAST: tl.constexpr, PRECISE: tl.constexpr,
    DROPOUT: tl.constexpr, THRESHOLD: tl.constexpr, INVERSE: tl.constexpr, STAGES: tl.constexpr,
):  # fmt: skip
    """`mixed = sum_k w_k h_k` and, per split of f, `partial_low[split, token, slot] = A_down h`.

    Grid: (tiles, splits); a program goes over `blocks` blocks of BF columns.
    """
    tile, split = tl.program_id(0), tl.program_id(1)
    start, end = tl.load(tile_start + tile), tl.load(tile_end + tile)
    if start >= end:
        return
    position = start + tl.arange(0, BT)
    live = position < end
    # Rows past the end repeat the last one, so that loads need no mask.
    t = tl.load(token_order + tl.minimum(position, end - 1))
    lane, column = tl.arange(0, R), tl.arange(0, BF)
    used = live[:, None] & (lane < r)[None, :]
    dtype = up.dtype.element_ty
    row = t.to(tl.int64) if WIDE else t
    if UNIFORM:
        experts, factors, lows_gate, lows_up, sums = (), (), (), (), ()
        for k in tl.static_range(K):
            e = tl.load(tile_experts + tile * N + k)
            lanes = e * r + lane
            experts = experts + (e,)
            factors = factors + (sorted_weight(sorted_weights, position, live, k, K),)
            lows_gate = lows_gate + (
                load_scaled(low_gate + row[:, None] * low_gate_stride + lanes[None, :], used, scaling),
            )
            lows_up = lows_up + (
                load_scaled(low_up + row[:, None] * low_up_stride + lanes[None, :], used, scaling),
            )
            sums = sums + (tl.zeros((BT, R), tl.float32),)
    else:
        count = tl.load(tile_count + tile)
        slots = tl.arange(0, KP)
        total = tl.zeros((KP, BT, R), tl.float32)
    if DROPOUT:
        drawn = tl.load(seed)
    for block in tl.range(0, blocks, num_stages=STAGES):
        c = (split * blocks + block) * BF + column
        columns = None if EVEN else (c < f)[None, :]
        inside = live[:, None] if EVEN else live[:, None] & (c < f)[None, :]
        table = (lane < r)[None, :] if EVEN else (c < f)[:, None] & (lane < r)[None, :]
        g = tl.load(gate + row[:, None] * gate_stride + c[None, :], mask=columns).to(tl.float32)
        u = tl.load(up + row[:, None] * up_stride + c[None, :], mask=columns).to(tl.float32)
        if DROPOUT:
            kept = dropout_factor(drawn, t[:, None], c[None, :], THRESHOLD, INVERSE)
        m = tl.zeros((BT, BF), tl.float32)
        if UNIFORM:
            updated = ()
            for k in tl.static_range(K):
                b = experts[k] * f * r + c[:, None] * r + lane[None, :]
                b_gate = tl.load(gate_B + b, mask=table, other=0.0)
                b_up = tl.load(up_B + b, mask=table, other=0.0)
                a_down = tl.load(
                    down_A + (experts[k] * r + lane)[None, :] * f + c[:, None], mask=table, other=0.0
                )
                h = activation(dot_into(lows_gate[k], tl.trans(b_gate), g, PRECISE), ACT, FAST)
                h = h * dot_into(lows_up[k], tl.trans(b_up), u, PRECISE)
                m += factors[k][:, None] * h
                if DROPOUT:
                    h = h * kept
                updated = updated + (dot_into(h.to(dtype), a_down, sums[k], PRECISE),)
            sums = updated
        else:
            for i in range(0, count):
                e = tl.load(tile_experts + tile * N + i)
                rank = rank_of(ids, t, live, e, K)
                chosen = used & (rank < K)[:, None]
                lanes = e * r + lane
                x_gate = load_scaled(
                    low_gate + row[:, None] * low_gate_stride + lanes[None, :], chosen, scaling
                )
                x_up = load_scaled(low_up + row[:, None] * low_up_stride + lanes[None, :], chosen, scaling)
                b = e * f * r + c[:, None] * r + lane[None, :]
                b_gate = tl.load(gate_B + b, mask=table, other=0.0)
                b_up = tl.load(up_B + b, mask=table, other=0.0)
                a_down = tl.load(down_A + (e * r + lane)[None, :] * f + c[:, None], mask=table, other=0.0)
                h = activation(dot_into(x_gate, tl.trans(b_gate), g, PRECISE), ACT, FAST)
                h = h * dot_into(x_up, tl.trans(b_up), u, PRECISE)
                m += tl.where(
                    (rank < K)[:, None], routing_weight(weights, ids, t, live, e, K)[:, None] * h, 0.0
                )
                if DROPOUT:
                    h = h * kept
                low = dot_into(h.to(dtype), a_down, tl.zeros((BT, R), tl.float32), PRECISE)
                total += tl.where(slots[:, None, None] == rank[None, :, None], low[None], 0.0)
        tl.store(mixed + row[:, None] * f + c[None, :], m.to(dtype), mask=inside)
    base = ((split * T + row) * K)[:, None] * r + lane[None, :]
    if UNIFORM:
        for k in tl.static_range(K):
            tl.store(partial_low + base + k * r, sums[k], mask=used)
    else:
        place = (split * T + row)[None, :, None] * K + slots[:, None, None]
        filled = used[None] & (slots < K)[:, None, None]
        tl.store(partial_low + place * r + lane[None, None, :], total, mask=filled)


@triton.jit(do_not_specialize=["T"])
def token_gradient_kernel(
    gate, up, d_mixed, low_gate, low_up, d_low_down, gate_B, up_B, down_A, weights, ids, seed,
    token_order, sorted_weights, tile_start, tile_end, tile_experts, tile_count,
    d_gate, d_up, partial_low, partial_weight,
    T, f, gate_stride, up_stride, mixed_stride, low_gate_stride, low_up_stride, low_down_stride, d_stride, blocks,
    scaling,
    K: tl.constexpr, N: tl.constexpr, r: tl.constexpr, R: tl.constexpr, KP: tl.constexpr,
    BT: tl.constexpr, BF: tl.constexpr, UNIFORM: tl.constexpr, EVEN: tl.constexpr, WIDE: tl.constexpr,
    ACT: tl.constexpr, FAST: tl.constexpr, PRECISE: tl.constexpr,
    DROPOUT: tl.constexpr, THRESHOLD: tl.constexpr, INVERSE: tl.constexpr, STAGES: tl.constexpr,
):  # fmt: skip
    """`d_gate`, `d_up`, and per split the row sums behind d_low_gate, d_low_up and d_weights.

    `partial_low[split, token, slot, 0 or 1]` holds `B^T dg / w` and `B^T du / w`;
    `partial_weight[split, token, slot]` holds `<q, h>`. Grid as in `forward_kernel`.
    """
    tile, split = tl.program_id(0), tl.program_id(1)
    start, end = tl.load(tile_start + tile), tl.load(tile_end + tile)
    if start >= end:
        return
    position = start + tl.arange(0, BT)
    live = position < end
    # Rows past the end repeat the last one, so that loads need no mask.
    t = tl.load(token_order + tl.minimum(position, end - 1))
    lane, column = tl.arange(0, R), tl.arange(0, BF)
    used = live[:, None] & (lane < r)[None, :]
    dtype = up.dtype.element_ty
    row = t.to(tl.int64) if WIDE else t
    if UNIFORM:
        experts, factors, lows_gate, lows_up, lows_down = (), (), (), (), ()
        sums_gate, sums_up, sums_weight = (), (), ()
        for k in tl.static_range(K):
            e = tl.load(tile_experts + tile * N + k)
            lanes = e * r + lane
            experts = experts + (e,)
            factors = factors + (sorted_weight(sorted_weights, position, live, k, K),)
            lows_gate = lows_gate + (
                load_scaled(low_gate + row[:, None] * low_gate_stride + lanes[None, :], used, scaling),
            )
            lows_up = lows_up + (
                load_scaled(low_up + row[:, None] * low_up_stride + lanes[None, :], used, scaling),
            )
            lows_down = lows_down + (
                load_scaled(d_low_down + row[:, None] * low_down_stride + lanes[None, :], used, scaling),
            )
            sums_gate = sums_gate + (tl.zeros((BT, R), tl.float32),)
            sums_up = sums_up + (tl.zeros((BT, R), tl.float32),)
            sums_weight = sums_weight + (tl.zeros((BT,), tl.float32),)
    else:
        count = tl.load(tile_count + tile)
        slots = tl.arange(0, KP)
        total_gate = tl.zeros((KP, BT, R), tl.float32)
        total_up = tl.zeros((KP, BT, R), tl.float32)
        total_weight = tl.zeros((KP, BT), tl.float32)
    if DROPOUT:
        drawn = tl.load(seed)
    for block in tl.range(0, blocks, num_stages=STAGES):
        c = (split * blocks + block) * BF + column
        columns = None if EVEN else (c < f)[None, :]
        inside = live[:, None] if EVEN else live[:, None] & (c < f)[None, :]
        table = (lane < r)[None, :] if EVEN else (c < f)[:, None] & (lane < r)[None, :]
        g = tl.load(gate + row[:, None] * gate_stride + c[None, :], mask=columns).to(tl.float32)
        u = tl.load(up + row[:, None] * up_stride + c[None, :], mask=columns).to(tl.float32)
        dm = tl.load(d_mixed + row[:, None] * mixed_stride + c[None, :], mask=columns).to(tl.float32)
        dg_sum = tl.zeros((BT, BF), tl.float32)
        du_sum = tl.zeros((BT, BF), tl.float32)
        if DROPOUT:
            kept = dropout_factor(drawn, t[:, None], c[None, :], THRESHOLD, INVERSE)
        if UNIFORM:
            new_gate, new_up, new_weight = (), (), ()
            for k in tl.static_range(K):
                b = experts[k] * f * r + c[:, None] * r + lane[None, :]
                b_gate = tl.load(gate_B + b, mask=table, other=0.0)
                b_up = tl.load(up_B + b, mask=table, other=0.0)
                a_down = tl.load(
                    down_A + (experts[k] * r + lane)[None, :] * f + c[:, None], mask=table, other=0.0
                )
                act, slope = activation_and_slope(
                    dot_into(lows_gate[k], tl.trans(b_gate), g, PRECISE), ACT, FAST
                )
                u_k = dot_into(lows_up[k], tl.trans(b_up), u, PRECISE)
                if DROPOUT:
                    q = dm + kept * dot_into(
                        lows_down[k], tl.trans(a_down), tl.zeros((BT, BF), tl.float32), PRECISE
                    )
                else:
                    q = dot_into(lows_down[k], tl.trans(a_down), dm, PRECISE)
                du = q * act
                dg = q * u_k * slope
                new_weight = new_weight + (sums_weight[k] + tl.sum(du * u_k, 1),)
                new_gate = new_gate + (dot_into(dg.to(dtype), b_gate, sums_gate[k], PRECISE),)
                new_up = new_up + (dot_into(du.to(dtype), b_up, sums_up[k], PRECISE),)
                dg_sum += factors[k][:, None] * dg
                du_sum += factors[k][:, None] * du
            sums_gate, sums_up, sums_weight = new_gate, new_up, new_weight
        else:
            for i in range(0, count):
                e = tl.load(tile_experts + tile * N + i)
                rank = rank_of(ids, t, live, e, K)
                chosen = used & (rank < K)[:, None]
                selected = (rank < K)[:, None]
                lanes = e * r + lane
                x_gate = load_scaled(
                    low_gate + row[:, None] * low_gate_stride + lanes[None, :], chosen, scaling
                )
                x_up = load_scaled(low_up + row[:, None] * low_up_stride + lanes[None, :], chosen, scaling)
                x_down = load_scaled(
                    d_low_down + row[:, None] * low_down_stride + lanes[None, :], chosen, scaling
                )
                b = e * f * r + c[:, None] * r + lane[None, :]
                b_gate = tl.load(gate_B + b, mask=table, other=0.0)
                b_up = tl.load(up_B + b, mask=table, other=0.0)
                a_down = tl.load(down_A + (e * r + lane)[None, :] * f + c[:, None], mask=table, other=0.0)
                act, slope = activation_and_slope(dot_into(x_gate, tl.trans(b_gate), g, PRECISE), ACT, FAST)
                u_k = dot_into(x_up, tl.trans(b_up), u, PRECISE)
                q = dot_into(x_down, tl.trans(a_down), tl.zeros((BT, BF), tl.float32), PRECISE)
                q = dm + (q * kept if DROPOUT else q)
                w = routing_weight(weights, ids, t, live, e, K)[:, None]
                du = q * act
                dg = q * u_k * slope
                inner = tl.sum(du * u_k, 1)
                zero = tl.zeros((BT, R), tl.float32)
                mine = slots[:, None] == rank[None, :]
                total_gate += tl.where(
                    mine[:, :, None], dot_into(dg.to(dtype), b_gate, zero, PRECISE)[None], 0.0
                )
                total_up += tl.where(mine[:, :, None], dot_into(du.to(dtype), b_up, zero, PRECISE)[None], 0.0)
                total_weight += tl.where(mine, inner[None], 0.0)
                dg_sum += tl.where(selected, w * dg, 0.0)
                du_sum += tl.where(selected, w * du, 0.0)
        tl.store(d_gate + row[:, None] * d_stride + c[None, :], dg_sum.to(dtype), mask=inside)
        tl.store(d_up + row[:, None] * d_stride + c[None, :], du_sum.to(dtype), mask=inside)
    if UNIFORM:
        for k in tl.static_range(K):
            place = (split * T + row) * K + k
            low = partial_low + place[:, None] * (2 * r) + lane[None, :]
            tl.store(low, sums_gate[k], mask=used)
            tl.store(low + r, sums_up[k], mask=used)
            tl.store(partial_weight + place, sums_weight[k], mask=live)
    else:
        place = (split * T + row)[None, :] * K + slots[:, None]
        filled = live[None, :] & (slots < K)[:, None]
        low = partial_low + place[:, :, None] * (2 * r) + lane[None, None, :]
        lanes_filled = filled[:, :, None] & (lane < r)[None, None, :]
        tl.store(low, total_gate, mask=lanes_filled)
        tl.store(low + r, total_up, mask=lanes_filled)
        tl.store(partial_weight + place, total_weight, mask=filled)


@triton.jit
def weight_gradient_kernel(
    gate, up, d_mixed, low_gate, low_up, d_low_down, gate_B, up_B, down_A, weights, ids, seed,
    row_order, sorted_weights, chunk_start, chunk_end, chunk_experts,
    partial,
    f, gate_stride, up_stride, mixed_stride, low_gate_stride, low_up_stride, low_down_stride, scaling,
    K: tl.constexpr, N: tl.constexpr, r: tl.constexpr, R: tl.constexpr, SLOTS: tl.constexpr,
    BT: tl.constexpr, BF: tl.constexpr, EVEN: tl.constexpr, WIDE: tl.constexpr,
    ACT: tl.constexpr, FAST: tl.constexpr, PRECISE: tl.constexpr,
    DROPOUT: tl.constexpr, THRESHOLD: tl.constexpr, INVERSE: tl.constexpr, STAGES: tl.constexpr,
):  # fmt: skip
    """Gradients of `gate_B`, `up_B`, `down_A` from one chunk of tokens with the same experts, for BF columns of f.

    `partial[chunk, slot, 0..2]` is `[f, r]`. SLOTS is K where rows are tokens and 1 where they are (token, choice)
    pairs. Tiles are `[BF, BT]`, so that each product takes its left side from registers. Grid: (f blocks, chunks).
    """
    chunk = tl.program_id(1)
    start, end = tl.load(chunk_start + chunk), tl.load(chunk_end + chunk)
    if start >= end:
        return
    lane = tl.arange(0, R)
    c = tl.program_id(0) * BF + tl.arange(0, BF)
    table = (lane < r)[None, :] if EVEN else (c < f)[:, None] & (lane < r)[None, :]
    dtype = up.dtype.element_ty
    experts, bs_gate, bs_up, as_down, sums_gate, sums_up, sums_down = (), (), (), (), (), (), ()
    for k in tl.static_range(SLOTS):
        e = tl.load(chunk_experts + chunk * N + k)
        b = e * f * r + c[:, None] * r + lane[None, :]
        experts = experts + (e,)
        bs_gate = bs_gate + (load_scaled(gate_B + b, table, scaling),)
        bs_up = bs_up + (load_scaled(up_B + b, table, scaling),)
        as_down = as_down + (load_scaled(down_A + (e * r + lane)[None, :] * f + c[:, None], table, scaling),)
        sums_gate = sums_gate + (tl.zeros((BF, R), tl.float32),)
        sums_up = sums_up + (tl.zeros((BF, R), tl.float32),)
        sums_down = sums_down + (tl.zeros((BF, R), tl.float32),)
    if DROPOUT:
        drawn = tl.load(seed)
    for first in tl.range(start, end, BT, num_stages=STAGES):
        position = first + tl.arange(0, BT)
        live = position < end
        t = tl.load(row_order + tl.minimum(position, end - 1))
        if SLOTS != K:
            t = t // K
        row = t.to(tl.int64) if WIDE else t
        columns = None if EVEN else (c < f)[:, None]
        used = live[:, None] & (lane < r)[None, :]
        g = tl.load(gate + row[None, :] * gate_stride + c[:, None], mask=columns).to(tl.float32)
        u = tl.load(up + row[None, :] * up_stride + c[:, None], mask=columns).to(tl.float32)
        dm = tl.load(d_mixed + row[None, :] * mixed_stride + c[:, None], mask=columns).to(tl.float32)
        if DROPOUT:
            kept = dropout_factor(drawn, t[None, :], c[:, None], THRESHOLD, INVERSE)
        new_gate, new_up, new_down = (), (), ()
        for k in tl.static_range(SLOTS):
            lanes = experts[k] * r + lane
            x_gate = tl.load(low_gate + row[:, None] * low_gate_stride + lanes[None, :], mask=used, other=0.0)
            x_up = tl.load(low_up + row[:, None] * low_up_stride + lanes[None, :], mask=used, other=0.0)
            x_down = tl.load(
                d_low_down + row[:, None] * low_down_stride + lanes[None, :], mask=used, other=0.0
            )
            w = sorted_weight(sorted_weights, position, live, k, SLOTS)[:, None]
            act, slope = activation_and_slope(dot_into(bs_gate[k], tl.trans(x_gate), g, PRECISE), ACT, FAST)
            u_k = dot_into(bs_up[k], tl.trans(x_up), u, PRECISE)
            if DROPOUT:
                q = dm + kept * dot_into(
                    as_down[k], tl.trans(x_down), tl.zeros((BF, BT), tl.float32), PRECISE
                )
            else:
                q = dot_into(as_down[k], tl.trans(x_down), dm, PRECISE)
            h = act * u_k
            if DROPOUT:
                h = h * kept
            # The weight of a token goes into the narrow factor.
            x_gate, x_up, x_down = (w * x_gate).to(dtype), (w * x_up).to(dtype), (w * x_down).to(dtype)
            new_gate = new_gate + (dot_into((q * u_k * slope).to(dtype), x_gate, sums_gate[k], PRECISE),)
            new_up = new_up + (dot_into((q * act).to(dtype), x_up, sums_up[k], PRECISE),)
            new_down = new_down + (dot_into(h.to(dtype), x_down, sums_down[k], PRECISE),)
        sums_gate, sums_up, sums_down = new_gate, new_up, new_down
    for k in tl.static_range(SLOTS):
        out = partial + ((chunk * SLOTS + k) * 3).to(tl.int64) * f * r + c[:, None] * r + lane[None, :]
        tl.store(out, scaling * sums_gate[k], mask=table)
        tl.store(out + f * r, scaling * sums_up[k], mask=table)
        tl.store(out + 2 * f * r, scaling * sums_down[k], mask=table)
