"""Triton kernels of the expert FFN: what happens between the frozen products, once per token and FFN column.

README.md has the formulas. Tokens come sorted by the set of experts that they selected, so that a tile of tokens needs
few experts: exactly `top_k` in a uniform plan, those in the tile's list otherwise (`triton_plan.py`). Nothing is
accumulated by atomics: programs write partial sums, which a second kernel adds in a fixed order.

Shapes: T tokens, f FFN size, N experts, K = top_k, r rank, R = r padded to a power of two of at least 16.
"""

from __future__ import annotations

import triton
import triton.language as tl


@triton.jit
def _tanh(x, FAST: tl.constexpr):
    if FAST:
        y = tl.inline_asm_elementwise(
            "tanh.approx.f32 $0, $1;", "=r,r", [x], dtype=tl.float32, is_pure=True, pack=1
        )
    else:
        y = 2 * tl.sigmoid(2 * x) - 1
    return y


@triton.jit
def _activation(x, ACT: tl.constexpr, FAST: tl.constexpr):
    """`act(x)`."""
    if ACT == "silu":
        if FAST:
            y = 0.5 * x
            y = y * _tanh(y, FAST) + y
        else:
            y = x * tl.sigmoid(x)
    elif ACT == "gelu_tanh":
        y = 0.5 * x
        y = y * _tanh(x * (0.7978845608028654 + 0.035677408136300125 * x * x), FAST) + y
    else:
        y = 0.5 * x
        y = y * tl.erf(x * 0.7071067811865476) + y
    return y


@triton.jit
def _activation_and_slope(x, ACT: tl.constexpr, FAST: tl.constexpr):
    """`act(x)` and `act'(x)`."""
    if ACT == "silu":
        if FAST:
            half = 0.5 * _tanh(0.5 * x, FAST)
            gate = half + 0.5
            rest = 0.5 - half
        else:
            gate = tl.sigmoid(x)
            rest = 1 - gate
        y = x * gate
        slope = y * rest + gate
    elif ACT == "gelu_tanh":
        square = x * x
        th = _tanh(x * (0.7978845608028654 + 0.035677408136300125 * square), FAST)
        half = 0.5 * x
        y = half * th + half
        slope = 0.5 + 0.5 * th + half * (1 - th * th) * (0.7978845608028654 + 0.10703222440890037 * square)
    else:
        share = 0.5 * tl.erf(x * 0.7071067811865476) + 0.5
        y = x * share
        slope = share + x * 0.3989422804014327 * tl.exp(-0.5 * x * x)
    return y, slope


@triton.jit
def dropout_factor(seed, row, column, THRESHOLD: tl.constexpr, INVERSE: tl.constexpr):
    """0 with probability p, else `1 / (1 - p)`: a hash of seed, token and FFN column, so that backward replays it.

    `THRESHOLD` is `p * 2^32`. `row` and `column` broadcast against each other. (32-bit finalizer of MurmurHash3.)
    """
    x = (seed.to(tl.uint32) + row.to(tl.uint32) * 0x9E3779B9) ^ (column.to(tl.uint32) * 0x85EBCA6B)
    x = (x ^ (x >> 16)) * 0x85EBCA6B
    x = (x ^ (x >> 13)) * 0xC2B2AE35
    x = x ^ (x >> 16)
    return tl.where(x >= THRESHOLD, INVERSE, 0.0)


@triton.jit
def _routing_weight(weights, ids, t, live, e, K: tl.constexpr):
    """Weight of expert `e` for each token; 0 for tokens that did not select it."""
    w = tl.zeros(t.shape, tl.float32)
    for k in tl.static_range(K):
        chosen = tl.load(ids + t * K + k, mask=live, other=-1) == e
        w += tl.where(chosen, tl.load(weights + t * K + k, mask=live, other=0.0).to(tl.float32), 0.0)
    return w


@triton.jit
def _sorted_weight(sorted_weights, position, live, k, K: tl.constexpr):
    """Weight of each row's expert number k, in ascending order of experts; rows as the plan sorted them."""
    return tl.load(sorted_weights + position * K + k, mask=live, other=0).to(tl.float32, bitcast=True)


@triton.jit
def _rank(ids, t, live, e, K: tl.constexpr):
    """How many of a token's experts have a lower index than `e`: the slot in which its partial sums lie.

    Tokens that did not select `e` get K.
    """
    below = tl.zeros(t.shape, tl.int32)
    chosen = tl.zeros(t.shape, tl.int1)
    for k in tl.static_range(K):
        other = tl.load(ids + t * K + k, mask=live, other=-1)
        below += (other < e).to(tl.int32)
        chosen = chosen | (other == e)
    return tl.where(chosen, below, K)


@triton.jit
def _scaled(ptr, mask, scaling):
    """What lies at `ptr`, times s, in its own dtype."""
    x = tl.load(ptr, mask=mask, other=0.0)
    return (x.to(tl.float32) * scaling).to(x.dtype)


@triton.jit
def _dot(a, b, acc, PRECISE: tl.constexpr):
    if PRECISE:
        out = tl.dot(a.to(tl.float32), b.to(tl.float32), acc, input_precision="ieee")
    else:
        out = tl.dot(a, b, acc)
    return out


@triton.jit(do_not_specialize=["T"])
def forward_kernel(
    gate, up, low_gate, low_up, gate_B, up_B, down_A, weights, ids, seed,
    token_order, sorted_weights, tile_start, tile_end, tile_experts, tile_count,
    mixed, partial_low,
    T, f, gate_stride, up_stride, low_gate_stride, low_up_stride, blocks, scaling,
    K: tl.constexpr, N: tl.constexpr, r: tl.constexpr, R: tl.constexpr, KP: tl.constexpr,
    BT: tl.constexpr, BF: tl.constexpr, UNIFORM: tl.constexpr, EVEN: tl.constexpr, WIDE: tl.constexpr,
    ACT: tl.constexpr, FAST: tl.constexpr, PRECISE: tl.constexpr,
    DROPOUT: tl.constexpr, THRESHOLD: tl.constexpr, INVERSE: tl.constexpr,
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
            factors = factors + (_sorted_weight(sorted_weights, position, live, k, K),)
            lows_gate = lows_gate + (
                _scaled(low_gate + row[:, None] * low_gate_stride + lanes[None, :], used, scaling),
            )
            lows_up = lows_up + (
                _scaled(low_up + row[:, None] * low_up_stride + lanes[None, :], used, scaling),
            )
            sums = sums + (tl.zeros((BT, R), tl.float32),)
    else:
        count = tl.load(tile_count + tile)
        slots = tl.arange(0, KP)
        total = tl.zeros((KP, BT, R), tl.float32)
    for block in range(0, blocks):
        c = (split * blocks + block) * BF + column
        columns = None if EVEN else (c < f)[None, :]
        inside = live[:, None] if EVEN else live[:, None] & (c < f)[None, :]
        table = (lane < r)[None, :] if EVEN else (c < f)[:, None] & (lane < r)[None, :]
        g = tl.load(gate + row[:, None] * gate_stride + c[None, :], mask=columns).to(tl.float32)
        u = tl.load(up + row[:, None] * up_stride + c[None, :], mask=columns).to(tl.float32)
        if DROPOUT:
            kept = dropout_factor(tl.load(seed), t[:, None], c[None, :], THRESHOLD, INVERSE)
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
                h = _activation(_dot(lows_gate[k], tl.trans(b_gate), g, PRECISE), ACT, FAST)
                h = h * _dot(lows_up[k], tl.trans(b_up), u, PRECISE)
                m += factors[k][:, None] * h
                if DROPOUT:
                    h = h * kept
                updated = updated + (_dot(h.to(dtype), a_down, sums[k], PRECISE),)
            sums = updated
        else:
            for i in range(0, count):
                e = tl.load(tile_experts + tile * N + i)
                rank = _rank(ids, t, live, e, K)
                chosen = used & (rank < K)[:, None]
                lanes = e * r + lane
                x_gate = _scaled(low_gate + row[:, None] * low_gate_stride + lanes[None, :], chosen, scaling)
                x_up = _scaled(low_up + row[:, None] * low_up_stride + lanes[None, :], chosen, scaling)
                b = e * f * r + c[:, None] * r + lane[None, :]
                b_gate = tl.load(gate_B + b, mask=table, other=0.0)
                b_up = tl.load(up_B + b, mask=table, other=0.0)
                a_down = tl.load(down_A + (e * r + lane)[None, :] * f + c[:, None], mask=table, other=0.0)
                h = _activation(_dot(x_gate, tl.trans(b_gate), g, PRECISE), ACT, FAST)
                h = h * _dot(x_up, tl.trans(b_up), u, PRECISE)
                m += tl.where(
                    (rank < K)[:, None], _routing_weight(weights, ids, t, live, e, K)[:, None] * h, 0.0
                )
                if DROPOUT:
                    h = h * kept
                low = _dot(h.to(dtype), a_down, tl.zeros((BT, R), tl.float32), PRECISE)
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
    T, f, gate_stride, up_stride, mixed_stride, low_gate_stride, low_up_stride, low_down_stride, blocks, scaling,
    K: tl.constexpr, N: tl.constexpr, r: tl.constexpr, R: tl.constexpr, KP: tl.constexpr,
    BT: tl.constexpr, BF: tl.constexpr, UNIFORM: tl.constexpr, EVEN: tl.constexpr, WIDE: tl.constexpr,
    ACT: tl.constexpr, FAST: tl.constexpr, PRECISE: tl.constexpr,
    DROPOUT: tl.constexpr, THRESHOLD: tl.constexpr, INVERSE: tl.constexpr,
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
            factors = factors + (_sorted_weight(sorted_weights, position, live, k, K),)
            lows_gate = lows_gate + (
                _scaled(low_gate + row[:, None] * low_gate_stride + lanes[None, :], used, scaling),
            )
            lows_up = lows_up + (
                _scaled(low_up + row[:, None] * low_up_stride + lanes[None, :], used, scaling),
            )
            lows_down = lows_down + (
                _scaled(d_low_down + row[:, None] * low_down_stride + lanes[None, :], used, scaling),
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
    for block in range(0, blocks):
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
            kept = dropout_factor(tl.load(seed), t[:, None], c[None, :], THRESHOLD, INVERSE)
        if UNIFORM:
            new_gate, new_up, new_weight = (), (), ()
            for k in tl.static_range(K):
                b = experts[k] * f * r + c[:, None] * r + lane[None, :]
                b_gate = tl.load(gate_B + b, mask=table, other=0.0)
                b_up = tl.load(up_B + b, mask=table, other=0.0)
                a_down = tl.load(
                    down_A + (experts[k] * r + lane)[None, :] * f + c[:, None], mask=table, other=0.0
                )
                act, slope = _activation_and_slope(
                    _dot(lows_gate[k], tl.trans(b_gate), g, PRECISE), ACT, FAST
                )
                u_k = _dot(lows_up[k], tl.trans(b_up), u, PRECISE)
                if DROPOUT:
                    q = dm + kept * _dot(
                        lows_down[k], tl.trans(a_down), tl.zeros((BT, BF), tl.float32), PRECISE
                    )
                else:
                    q = _dot(lows_down[k], tl.trans(a_down), dm, PRECISE)
                du = q * act
                dg = q * u_k * slope
                new_weight = new_weight + (sums_weight[k] + tl.sum(du * u_k, 1),)
                new_gate = new_gate + (_dot(dg.to(dtype), b_gate, sums_gate[k], PRECISE),)
                new_up = new_up + (_dot(du.to(dtype), b_up, sums_up[k], PRECISE),)
                dg_sum += factors[k][:, None] * dg
                du_sum += factors[k][:, None] * du
            sums_gate, sums_up, sums_weight = new_gate, new_up, new_weight
        else:
            for i in range(0, count):
                e = tl.load(tile_experts + tile * N + i)
                rank = _rank(ids, t, live, e, K)
                chosen = used & (rank < K)[:, None]
                selected = (rank < K)[:, None]
                lanes = e * r + lane
                x_gate = _scaled(low_gate + row[:, None] * low_gate_stride + lanes[None, :], chosen, scaling)
                x_up = _scaled(low_up + row[:, None] * low_up_stride + lanes[None, :], chosen, scaling)
                x_down = _scaled(
                    d_low_down + row[:, None] * low_down_stride + lanes[None, :], chosen, scaling
                )
                b = e * f * r + c[:, None] * r + lane[None, :]
                b_gate = tl.load(gate_B + b, mask=table, other=0.0)
                b_up = tl.load(up_B + b, mask=table, other=0.0)
                a_down = tl.load(down_A + (e * r + lane)[None, :] * f + c[:, None], mask=table, other=0.0)
                act, slope = _activation_and_slope(_dot(x_gate, tl.trans(b_gate), g, PRECISE), ACT, FAST)
                u_k = _dot(x_up, tl.trans(b_up), u, PRECISE)
                q = _dot(x_down, tl.trans(a_down), tl.zeros((BT, BF), tl.float32), PRECISE)
                q = dm + (q * kept if DROPOUT else q)
                w = _routing_weight(weights, ids, t, live, e, K)[:, None]
                du = q * act
                dg = q * u_k * slope
                inner = tl.sum(du * u_k, 1)
                zero = tl.zeros((BT, R), tl.float32)
                mine = slots[:, None] == rank[None, :]
                total_gate += tl.where(mine[:, :, None], _dot(dg.to(dtype), b_gate, zero, PRECISE)[None], 0.0)
                total_up += tl.where(mine[:, :, None], _dot(du.to(dtype), b_up, zero, PRECISE)[None], 0.0)
                total_weight += tl.where(mine, inner[None], 0.0)
                dg_sum += tl.where(selected, w * dg, 0.0)
                du_sum += tl.where(selected, w * du, 0.0)
        tl.store(d_gate + row[:, None] * f + c[None, :], dg_sum.to(dtype), mask=inside)
        tl.store(d_up + row[:, None] * f + c[None, :], du_sum.to(dtype), mask=inside)
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
    DROPOUT: tl.constexpr, THRESHOLD: tl.constexpr, INVERSE: tl.constexpr,
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
        bs_gate = bs_gate + (_scaled(gate_B + b, table, scaling),)
        bs_up = bs_up + (_scaled(up_B + b, table, scaling),)
        as_down = as_down + (_scaled(down_A + (e * r + lane)[None, :] * f + c[:, None], table, scaling),)
        sums_gate = sums_gate + (tl.zeros((BF, R), tl.float32),)
        sums_up = sums_up + (tl.zeros((BF, R), tl.float32),)
        sums_down = sums_down + (tl.zeros((BF, R), tl.float32),)
    for first in range(start, end, BT):
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
            kept = dropout_factor(tl.load(seed), t[None, :], c[:, None], THRESHOLD, INVERSE)
        new_gate, new_up, new_down = (), (), ()
        for k in tl.static_range(SLOTS):
            lanes = experts[k] * r + lane
            x_gate = tl.load(low_gate + row[:, None] * low_gate_stride + lanes[None, :], mask=used, other=0.0)
            x_up = tl.load(low_up + row[:, None] * low_up_stride + lanes[None, :], mask=used, other=0.0)
            x_down = tl.load(
                d_low_down + row[:, None] * low_down_stride + lanes[None, :], mask=used, other=0.0
            )
            w = _sorted_weight(sorted_weights, position, live, k, SLOTS)[:, None]
            act, slope = _activation_and_slope(_dot(bs_gate[k], tl.trans(x_gate), g, PRECISE), ACT, FAST)
            u_k = _dot(bs_up[k], tl.trans(x_up), u, PRECISE)
            if DROPOUT:
                q = dm + kept * _dot(as_down[k], tl.trans(x_down), tl.zeros((BF, BT), tl.float32), PRECISE)
            else:
                q = _dot(as_down[k], tl.trans(x_down), dm, PRECISE)
            h = act * u_k
            if DROPOUT:
                h = h * kept
            # The weight of a token goes into the narrow factor.
            x_gate, x_up, x_down = (w * x_gate).to(dtype), (w * x_up).to(dtype), (w * x_down).to(dtype)
            new_gate = new_gate + (_dot((q * u_k * slope).to(dtype), x_gate, sums_gate[k], PRECISE),)
            new_up = new_up + (_dot((q * act).to(dtype), x_up, sums_up[k], PRECISE),)
            new_down = new_down + (_dot(h.to(dtype), x_down, sums_down[k], PRECISE),)
        sums_gate, sums_up, sums_down = new_gate, new_up, new_down
    for k in tl.static_range(SLOTS):
        out = partial + ((chunk * SLOTS + k) * 3).to(tl.int64) * f * r + c[:, None] * r + lane[None, :]
        tl.store(out, scaling * sums_gate[k], mask=table)
        tl.store(out + f * r, scaling * sums_up[k], mask=table)
        tl.store(out + 2 * f * r, scaling * sums_down[k], mask=table)


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
                choice = tl.load(ids + t * K + k, mask=live, other=-1)
                place_of = tl.zeros((BT,), tl.int32)
                for j in tl.static_range(K):
                    place_of += (tl.load(ids + t * K + j, mask=live, other=-1) < choice).to(tl.int32)
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
