# ruff: noqa: SIM300 - a constexpr comes first
"""The decode kernels: few tokens, so weights are the tall operand of every product and tokens its narrow one.

Tiles are `[output rows, tokens]`; a single token takes the kernels of `triton_single`. README.md has the reasoning. No
kernel uses atomics, so results repeat bit for bit.
"""

from __future__ import annotations

from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from graphlora.ops.backend import interprets_triton
from graphlora.ops.decode import triton_single as single
from graphlora.ops.decode.reference import F_BLOCK, SPLIT_DEPTH
from graphlora.ops.decode.triton_rows import own_output, own_rows
from graphlora.ops.graph_route.triton_act import activation
from graphlora.ops.sizes import ceil_div, next_power_of_2

# Rows of the skinny product that one program owns, and how many bytes of a row of x it reads at once.
_ROWS, _DEPTH_BYTES = 16, 256
# Output rows that one program owns, stacked low-rank columns it takes at once, and its token-slot pairs at most.
_OUT_BLOCK, _COLUMNS, _PAIRS = 32, 64, 128
# Activations that leave registers for `_PAIRS`.
_LIGHT = {"silu", "relu"}
# The interpreter cannot multiply bfloat16 matrices.
_INTERPRETED = tl.constexpr(interprets_triton())
_DOT_TYPES = {torch.bfloat16: tl.bfloat16, torch.float16: tl.float16, torch.float32: tl.float32}


@triton.jit
def _rounded_dot(a, b, total, DOT: tl.constexpr):
    """`total + a b` on tensor cores in `DOT`; float32 as three products of TF32, which keeps 21 bits."""
    if DOT == tl.float32:
        return tl.dot(a, b, total, input_precision="tf32x3")
    if _INTERPRETED:
        return tl.dot(a.to(DOT).to(tl.float32), b.to(DOT).to(tl.float32), total)
    return tl.dot(a.to(DOT), b.to(DOT), total)


@triton.jit
def _rows_times_tokens(
    x, weight, rows, num_rows, t, tokens, start, d: tl.constexpr, LENGTH: tl.constexpr,
    EXACT: tl.constexpr, ROWS: tl.constexpr, BT: tl.constexpr, DEPTH: tl.constexpr, DOT: tl.constexpr,
):  # fmt: skip
    """`[ROWS, BT]`: rows of a weight times tokens over LENGTH positions from `start`, float32.

    `EXACT` adds what rounding the weight to `DOT` leaves over.
    """
    total = tl.zeros([ROWS, BT], tl.float32)
    for first in range(0, LENGTH, DEPTH):
        i = start + first + tl.arange(0, DEPTH)
        w = tl.load(
            weight + rows[:, None] * d + i[None, :],
            mask=(rows < num_rows)[:, None] & (i < d)[None, :], other=0.0,
        ).to(tl.float32)  # fmt: skip
        xt = tl.load(
            x + t[None, :] * d + i[:, None], mask=(t < tokens)[None, :] & (i < d)[:, None], other=0.0
        )
        total = _rounded_dot(w, xt, total, DOT)
        if EXACT and DOT != tl.float32:
            total = _rounded_dot(w - w.to(DOT).to(tl.float32), xt, total, DOT)
    return total


@triton.jit
def _project_kernel(
    x, first, second, third, out, square_sum, tokens, rows1, rows2, rows3, blocks1, blocks2, blocks3,
    d: tl.constexpr, ROWS: tl.constexpr, BT: tl.constexpr, DEPTH: tl.constexpr, DOT: tl.constexpr,
):  # fmt: skip
    """Three products side by side, in the weights' full precision; the last program sums squares."""
    block = tl.program_id(0)
    t = tl.arange(0, BT)
    if block == blocks1 + blocks2 + blocks3:
        squares = tl.zeros([BT], tl.float32)
        for start in range(0, d, 64):
            i = start + tl.arange(0, 64)
            inside = (t < tokens)[None, :] & (i < d)[:, None]
            xt = tl.load(x + t[None, :] * d + i[:, None], mask=inside, other=0.0).to(tl.float32)
            squares += tl.sum(xt * xt, axis=0)
        tl.store(square_sum + t, squares, mask=t < tokens)
    else:
        weight, num_rows, row_block, column = own_rows(
            first, second, third, rows1, rows2, rows3, blocks1, blocks2
        )
        rows = row_block * ROWS + tl.arange(0, ROWS)
        value = _rows_times_tokens(
            x, weight, rows, num_rows, t, tokens, 0, d, d, True, ROWS, BT, DEPTH, DOT
        )  # fmt: skip
        tl.store(
            out + t[None, :] * (rows1 + rows2 + rows3) + (column + rows)[:, None], value,
            mask=(rows < num_rows)[:, None] & (t < tokens)[None, :],
        )  # fmt: skip


@triton.jit
def _low_rank_kernel(
    x, first, second, third, out, tokens, rows1, rows2, rows3, blocks1, blocks2, d: tl.constexpr,
    LENGTH: tl.constexpr, ROWS: tl.constexpr, BT: tl.constexpr, DEPTH: tl.constexpr, DOT: tl.constexpr,
):  # fmt: skip
    """`out[part]`: three products side by side over one part of d; whoever reads it adds the parts."""
    weight, num_rows, row_block, column = own_rows(
        first, second, third, rows1, rows2, rows3, blocks1, blocks2
    )
    rows = row_block * ROWS + tl.arange(0, ROWS)
    part = tl.program_id(1)
    t = tl.arange(0, BT)
    value = _rows_times_tokens(
        x, weight, rows, num_rows, t, tokens, part * LENGTH, d, LENGTH, False,
        ROWS, BT, DEPTH, DOT,
    )  # fmt: skip
    tl.store(
        out + (part * tokens + t[None, :]) * (rows1 + rows2 + rows3) + (column + rows)[:, None], value,
        mask=(rows < num_rows)[:, None] & (t < tokens)[None, :],
    )  # fmt: skip


@triton.jit
def _add_low_rank_kernel(
    base1, base2, base3, weight1, weight2, weight3, out1, out2, out3, low, tokens, width1, width2, width3,
    blocks1, blocks2, scaling, PARTS: tl.constexpr,
    STRIDE: tl.constexpr, R: tl.constexpr, RP: tl.constexpr, BT: tl.constexpr, BO: tl.constexpr, DOT: tl.constexpr,
):  # fmt: skip
    """`out = base + scaling * B low` of three outputs, with low summed over its parts in order."""
    base, weight, out, width, which, block = own_output(
        base1, base2, base3, weight1, weight2, weight3, out1, out2, out3, width1, width2, width3,
        blocks1, blocks2,
    )  # fmt: skip
    o = block * BO + tl.arange(0, BO)
    t = tl.arange(0, BT)
    j = tl.arange(0, RP)
    own = (o < width)[:, None] & (t < tokens)[None, :]
    before = tl.load(base + t[None, :] * width + o[:, None], mask=own, other=0.0).to(tl.float32)
    b = tl.load(
        weight + o[:, None] * R + j[None, :], mask=(o < width)[:, None] & (j < R)[None, :], other=0.0
    ).to(tl.float32)
    value = tl.zeros([RP, BT], tl.float32)
    for part in range(PARTS):
        value += tl.load(
            low + (part * tokens + t[None, :]) * STRIDE + which * R + j[:, None],
            mask=(j < R)[:, None] & (t < tokens)[None, :], other=0.0,
        )  # fmt: skip
    delta = _rounded_dot(b, value, tl.zeros([BO, BT], tl.float32), DOT)
    tl.store(
        out + t[None, :] * width + o[:, None],
        (before + scaling * delta).to(out.dtype.element_ty), mask=own,
    )  # fmt: skip


@triton.jit
def _down_rows(down_A, c, used, f_pos, f_ok, f):
    return tl.load(down_A + c[:, None] * f + f_pos[None, :], mask=used[:, None] & f_ok[None, :], other=0.0)


@triton.jit
def _mix_kernel(
    gate, up, low, gate_B, up_B, down_A, weights, index, mixed, partial, tokens, f, low_stride, scaling,
    N: tl.constexpr, R: tl.constexpr, K: tl.constexpr, KP: tl.constexpr, BT: tl.constexpr,
    BF: tl.constexpr, BC: tl.constexpr, ACT: tl.constexpr, DOT: tl.constexpr,
):  # fmt: skip
    """The mix of the selected experts' hidden states, and this block's share of their down projections.

    Tiles are `[f, pairs]`; pair `t * KP + k` is slot k of token t. Of the `N * R` stacked low-rank columns, BC at a
    time, a pair multiplies zeros except in its own expert's; columns that no pair wants are not read.
    """
    PAIRS: tl.constexpr = BT * KP
    f_block = tl.program_id(0)
    f_pos = f_block * BF + tl.arange(0, BF)
    f_ok = f_pos < f
    pair = tl.arange(0, PAIRS)
    t = tl.program_id(1) * BT + pair // KP
    k = pair % KP
    pair_ok = (t < tokens) & (k < K)
    expert = tl.load(index + t * K + k, mask=pair_ok, other=-1).to(tl.int32)
    weight = tl.load(weights + t * K + k, mask=pair_ok, other=0.0).to(tl.float32)
    tile = f_ok[:, None] & pair_ok[None, :]
    g = tl.load(gate + t[None, :] * f + f_pos[:, None], mask=tile, other=0.0)
    u = tl.load(up + t[None, :] * f + f_pos[:, None], mask=tile, other=0.0)
    delta_g = tl.zeros([BF, PAIRS], tl.float32)
    delta_u = tl.zeros([BF, PAIRS], tl.float32)
    for start in range(0, N * R, BC):
        c = start + tl.arange(0, BC)
        own = ((c // R)[:, None] == expert[None, :]) & (c < N * R)[:, None]
        used = tl.max(own.to(tl.int32), axis=1) > 0
        b_at = (c // R)[None, :] * f * R + f_pos[:, None] * R + (c % R)[None, :]
        b_ok = f_ok[:, None] & used[None, :]
        b_gate = tl.load(gate_B + b_at, mask=b_ok, other=0.0).to(tl.float32)
        b_up = tl.load(up_B + b_at, mask=b_ok, other=0.0).to(tl.float32)
        low_at = low + t[None, :] * low_stride + c[:, None]
        low_gate = tl.load(low_at, mask=own, other=0.0)
        low_up = tl.load(low_at + N * R, mask=own, other=0.0)
        delta_g = _rounded_dot(b_gate, low_gate, delta_g, DOT)
        delta_u = _rounded_dot(b_up, low_up, delta_u, DOT)
    hidden = activation(g.to(tl.float32) + scaling * delta_g, ACT, True) * (
        u.to(tl.float32) + scaling * delta_u
    )
    hidden = hidden * weight[None, :]
    m = tl.sum(tl.reshape(hidden, [BF, BT, KP]), axis=2)
    token = tl.program_id(1) * BT + tl.arange(0, BT)
    tl.store(
        mixed + token[None, :] * f + f_pos[:, None], m.to(mixed.dtype.element_ty),
        mask=f_ok[:, None] & (token < tokens)[None, :],
    )  # fmt: skip
    for start in range(0, N * R, BC):
        c = start + tl.arange(0, BC)
        own = ((c // R)[:, None] == expert[None, :]) & (c < N * R)[:, None]
        used = tl.max(own.to(tl.int32), axis=1) > 0
        a = _down_rows(down_A, c, used, f_pos, f_ok, f).to(tl.float32)
        p = _rounded_dot(a, hidden, tl.zeros([BC, PAIRS], tl.float32), DOT)
        at = ((f_block * tokens + t) * K + k)[None, :] * R + (c % R)[:, None]
        tl.store(partial + at, p, mask=own)


@triton.jit
def _combine_kernel(
    base, low, index, down_B, out, tokens, d, scaling,
    N: tl.constexpr, R: tl.constexpr, K: tl.constexpr, BT: tl.constexpr,
    BD: tl.constexpr, BC: tl.constexpr, DOT: tl.constexpr,
):  # fmt: skip
    """`out = base + scaling * sum over k of B_down[expert k] low_k`."""
    i = tl.program_id(0) * BD + tl.arange(0, BD)
    i_ok = i < d
    t = tl.arange(0, BT)
    t_ok = t < tokens
    own = i_ok[:, None] & t_ok[None, :]
    before = tl.load(base + t[None, :] * d + i[:, None], mask=own, other=0.0).to(tl.float32)
    delta = tl.zeros([BD, BT], tl.float32)
    for start in range(0, N * R, BC):
        c = start + tl.arange(0, BC)
        value = tl.zeros([BC, BT], tl.float32)
        for k in range(K):
            expert = tl.load(index + t * K + k, mask=t_ok, other=-1).to(tl.int32)
            mine = ((c // R)[:, None] == expert[None, :]) & (c < N * R)[:, None]
            value += tl.load(low + ((t * K + k) * R)[None, :] + (c % R)[:, None], mask=mine, other=0.0)
        b = tl.load(
            down_B + (c // R)[None, :] * d * R + i[:, None] * R + (c % R)[None, :],
            mask=i_ok[:, None] & (c < N * R)[None, :], other=0.0,
        ).to(tl.float32)  # fmt: skip
        delta = _rounded_dot(b, value, delta, DOT)
    tl.store(out + t[None, :] * d + i[:, None], (before + scaling * delta).to(out.dtype.element_ty), mask=own)


def project(x: Tensor, first: Tensor, second: Tensor, third: Tensor) -> tuple[Tensor, Tensor]:
    """See `reference.project`."""
    tokens, d = x.shape
    weights = _alike([first, second, third])
    if tokens <= single.PROJECT_TOKENS:
        return single.project(x, *weights)
    sizes = [len(weight) for weight in weights]
    out = x.new_empty(tokens, sum(sizes), dtype=torch.float32)
    square_sum = x.new_empty(tokens, dtype=torch.float32)
    blocks = [ceil_div(size, _ROWS) for size in sizes]
    _project_kernel[(sum(blocks) + 1,)](
        x.contiguous(), *(weight.contiguous() for weight in weights), out, square_sum, tokens, *sizes, *blocks,
        d=d, ROWS=_ROWS, BT=_token_block(tokens), DEPTH=_DEPTH_BYTES // x.element_size(),
        DOT=_DOT_TYPES[x.dtype], num_warps=4,
    )  # fmt: skip
    return out, square_sum


def low_rank(x: Tensor, weights: list[Tensor]) -> Tensor:
    """See `reference.low_rank`."""
    tokens, d = x.shape
    is_single = single.takes(tokens)
    rows = single.ROWS if is_single else _ROWS
    parts, sizes = ceil_div(d, SPLIT_DEPTH), [len(weight) for weight in weights]
    blocks = [ceil_div(size, rows) for size in sizes]
    out = x.new_empty(parts, tokens, sum(sizes), dtype=torch.float32)
    inputs = (x.contiguous(), *_three([weight.contiguous() for weight in _alike(weights)]), out)
    if is_single:
        single.low_rank_kernel[(sum(blocks), parts, tokens)](
            *inputs, *_three(sizes, 0), *_three(blocks, 0)[:2],
            d=d, ROWS=rows, DEPTH=SPLIT_DEPTH, DOT=_DOT_TYPES[x.dtype], num_warps=4,
        )  # fmt: skip
        return out
    _low_rank_kernel[(sum(blocks), parts)](
        *inputs, tokens, *_three(sizes, 0), *_three(blocks, 0)[:2],
        d=d, LENGTH=min(SPLIT_DEPTH, d), ROWS=rows, BT=_token_block(tokens), DEPTH=_DEPTH_BYTES // x.element_size(),
        DOT=_DOT_TYPES[x.dtype], num_warps=4,
    )  # fmt: skip
    return out


def add_low_rank(low: Tensor, bases: list[Tensor], weights: list[Tensor], scaling: float) -> list[Tensor]:
    """See `reference.add_low_rank`."""
    ranks = [weight.shape[1] for weight in weights]
    if len(set(ranks)) > 1:
        own = zip(low.split(ranks, 2), bases, weights, strict=True)
        return [add_low_rank(part, [base], [weight], scaling)[0] for part, base, weight in own]
    parts, tokens, _ = low.shape
    r = ranks[0]
    is_single = single.takes(tokens, r)
    out_block = single.OUT_BLOCK if is_single else _OUT_BLOCK
    widths = [base.shape[1] for base in bases]
    blocks = [ceil_div(width, out_block) for width in widths]
    outs = [base.new_empty(base.shape) for base in bases]
    tensors = (
        [base.contiguous() for base in bases],
        [weight.contiguous() for weight in _alike(weights)],
        outs,
    )
    inputs = (*(each for group in tensors for each in _three(group)), low)
    sizes = (*_three(widths, 0), *_three(blocks, 0)[:2], scaling)
    if is_single:
        single.add_low_rank_kernel[(sum(blocks), tokens)](
            *inputs, *sizes, PARTS=parts, STRIDE=low.stride(1), PP=next_power_of_2(parts), R=r,
            RP=next_power_of_2(r), BO=out_block, DOT=_DOT_TYPES[bases[0].dtype], num_warps=4,
        )  # fmt: skip
        return outs
    _add_low_rank_kernel[(sum(blocks),)](
        *inputs, tokens, *sizes, PARTS=parts, STRIDE=low.stride(1), R=r, RP=max(16, next_power_of_2(r)),
        BT=_token_block(tokens), BO=out_block, DOT=_DOT_TYPES[bases[0].dtype], num_warps=4,
    )  # fmt: skip
    return outs


def mix(
    gate: Tensor,
    up: Tensor,
    low: Tensor,
    gate_B: Tensor,
    up_B: Tensor,
    down_A: Tensor,
    top_k_weights: Tensor,
    top_k_index: Tensor,
    scaling: float,
    act: str,
) -> tuple[Tensor, Tensor]:
    """See `reference.mix`."""
    tokens, f = gate.shape
    num_experts, r, _ = down_A.shape
    top_k = top_k_index.shape[1]
    if single.takes(tokens, r, top_k):
        return single.mix(gate, up, low, gate_B, up_B, down_A, top_k_weights, top_k_index, scaling, act)
    slots = next_power_of_2(top_k)
    pairs = _pairs(act, num_experts * r, gate.dtype)
    # Triton 3.6 for sm_90 gets the second product wrong where fewer than 64 pairs meet 64 stacked columns in half
    # precision: they are stored to shared memory in the order of narrower rows.
    fewest = 16 if gate.dtype == torch.float32 else 64
    token_block = max(min(next_power_of_2(tokens), pairs // slots), fewest // slots, 1)
    f_blocks = ceil_div(f, F_BLOCK)
    mixed = gate.new_empty(gate.shape)
    partial = gate.new_empty(f_blocks, tokens, top_k, r, dtype=torch.float32)
    _mix_kernel[(f_blocks, ceil_div(tokens, token_block))](
        *(t.contiguous() for t in (gate, up)), low,
        *(t.contiguous() for t in (gate_B, up_B, down_A, top_k_weights, top_k_index)), mixed, partial, tokens,
        f, low.stride(0), scaling,
        N=num_experts, R=r, K=top_k, KP=slots, BT=token_block, BF=F_BLOCK, BC=_columns(num_experts * r),
        ACT=act, DOT=_DOT_TYPES[gate.dtype], num_warps=8 if token_block * slots > 64 else 4,
        num_stages=_stages(num_experts * r),
    )  # fmt: skip
    return mixed, partial


def combine(base: Tensor, low: Tensor, top_k_index: Tensor, down_B: Tensor, scaling: float) -> Tensor:
    """See `reference.combine`."""
    tokens, d = base.shape
    num_experts, _, r = down_B.shape
    if single.takes(tokens, r, top_k_index.shape[1]):
        return single.combine(base, low, top_k_index, down_B, scaling)
    out = base.new_empty(base.shape)
    _combine_kernel[(ceil_div(d, _OUT_BLOCK),)](
        *(t.contiguous() for t in (base, low, top_k_index, down_B)), out, tokens, d, scaling,
        N=num_experts, R=r, K=top_k_index.shape[1], BT=_token_block(tokens), BD=_OUT_BLOCK,
        BC=_columns(num_experts * r), DOT=_DOT_TYPES[base.dtype], num_warps=4,
        num_stages=_stages(num_experts * r),
    )  # fmt: skip
    return out


def _three(items: list[Any], filler: Any = None) -> tuple[Any, ...]:
    """One to three items as three: the first stands for those that no program takes, or `filler` does."""
    return (*items, *[items[0] if filler is None else filler] * (3 - len(items)))


def _alike(weights: list[Tensor]) -> list[Tensor]:
    """In one dtype, since a kernel chooses between their addresses."""
    if len({weight.dtype for weight in weights}) == 1:
        return weights
    return [weight.float() for weight in weights]


def _token_block(tokens: int) -> int:
    return max(16, next_power_of_2(tokens))


def _columns(stacked: int) -> int:
    return max(16, next_power_of_2(stacked)) if stacked <= _COLUMNS else _COLUMNS // 2


def _pairs(act: str, stacked: int, dtype: torch.dtype) -> int:
    """Token-slot pairs of one program that registers have room for, as compiled for sm_90."""
    if dtype == torch.float32:
        return _PAIRS // 4
    return _PAIRS if act in _LIGHT and stacked <= _COLUMNS else _PAIRS // 2


def _stages(stacked: int) -> int:
    """Loops over several blocks of columns would fill shared memory at Triton's default depth."""
    return 3 if stacked <= _COLUMNS else 1
