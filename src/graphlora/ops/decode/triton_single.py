"""The decode kernels for one token per program: no tensor cores, every load on its way before the first is used.

With a single token the frozen products are matrix-vector products, 27 us at the longest, and what runs beside or behind
them must not wait for memory several times in a row. README.md has the reasoning. Sums have a fixed order.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from graphlora.ops.decode.reference import F_BLOCK
from graphlora.ops.decode.triton_rows import own_output, own_rows
from graphlora.ops.graph_route.triton_act import activation, narrowed
from graphlora.ops.sizes import ceil_div, next_power_of_2

# Forwards of at most this many tokens take these kernels, for the first product at most that many; each token has
# programs of its own. Beyond, and with more columns in all than 16 tokens of rank 8 and two experts have, reading the
# weights once for all tokens counts for more. Measured, see README.md.
TOKENS, PROJECT_TOKENS, _ALL_COLUMNS = 16, 32, 256
# Rows of the skinny product that one program owns, and positions of d that it reads at once.
ROWS, _DEPTH = 2, 4096
# Output rows of one program, and columns beside them (rank, times slots) that registers have room for.
OUT_BLOCK, _COLUMNS = 64, 64
_DOT_TYPES = {torch.bfloat16: tl.bfloat16, torch.float16: tl.float16, torch.float32: tl.float32}


@triton.jit
def _rounded(x, DOT: tl.constexpr):
    """As an input of a product in `DOT`, in float32."""
    return narrowed(x, DOT).to(tl.float32)


@triton.jit
def _project_kernel(
    x, first, second, third, out, square_sum, rows1, rows2, rows3, blocks1, blocks2, blocks3,
    d: tl.constexpr, ROWS: tl.constexpr, DEPTH: tl.constexpr,
):  # fmt: skip
    """Three products side by side, in the weights' full precision; the last program of a token sums squares."""
    block = tl.program_id(0)
    t = tl.program_id(1)
    if block == blocks1 + blocks2 + blocks3:
        squares = tl.zeros([DEPTH], tl.float32)
        for start in range(0, d, DEPTH):
            i = start + tl.arange(0, DEPTH)
            xt = tl.load(x + t * d + i, mask=i < d, other=0.0).to(tl.float32)
            squares += xt * xt
        tl.store(square_sum + t, tl.sum(squares, axis=0))
    else:
        weight, num_rows, row_block, column = own_rows(
            first, second, third, rows1, rows2, rows3, blocks1, blocks2
        )
        rows = row_block * ROWS + tl.arange(0, ROWS)
        total = tl.zeros([ROWS, DEPTH], tl.float32)
        for start in range(0, d, DEPTH):
            i = start + tl.arange(0, DEPTH)
            live = (rows < num_rows)[:, None] & (i < d)[None, :]
            w = tl.load(weight + rows[:, None] * d + i[None, :], mask=live, other=0.0).to(tl.float32)
            xt = tl.load(x + t * d + i, mask=i < d, other=0.0).to(tl.float32)
            total += w * xt[None, :]
        at = t * (rows1 + rows2 + rows3) + column + rows
        tl.store(out + at, tl.sum(total, axis=1), mask=rows < num_rows)


@triton.jit
def low_rank_kernel(
    x, first, second, third, out, rows1, rows2, rows3, blocks1, blocks2, d: tl.constexpr,
    ROWS: tl.constexpr, DEPTH: tl.constexpr, DOT: tl.constexpr,
):  # fmt: skip
    """`out[part]`: three products side by side over one part of d; whoever reads it adds the parts."""
    weight, num_rows, row_block, column = own_rows(
        first, second, third, rows1, rows2, rows3, blocks1, blocks2
    )
    rows = row_block * ROWS + tl.arange(0, ROWS)
    part, t = tl.program_id(1), tl.program_id(2)
    i = part * DEPTH + tl.arange(0, DEPTH)
    live = (rows < num_rows)[:, None] & (i < d)[None, :]
    w = tl.load(weight + rows[:, None] * d + i[None, :], mask=live, other=0.0).to(tl.float32)
    xt = tl.load(x + t * d + i, mask=i < d, other=0.0).to(tl.float32)
    value = tl.sum(_rounded(w, DOT) * xt[None, :], axis=1)
    at = (part * tl.num_programs(2) + t) * (rows1 + rows2 + rows3) + column + rows
    tl.store(out + at, value, mask=rows < num_rows)


@triton.jit
def add_low_rank_kernel(
    base1, base2, base3, weight1, weight2, weight3, out1, out2, out3, low, width1, width2, width3,
    blocks1, blocks2, scaling, PARTS: tl.constexpr, PP: tl.constexpr,
    STRIDE: tl.constexpr, R: tl.constexpr, RP: tl.constexpr, BO: tl.constexpr, DOT: tl.constexpr,
):  # fmt: skip
    """`out = base + scaling * B low` of three outputs, with low summed over its parts."""
    base, weight, out, width, which, block = own_output(
        base1, base2, base3, weight1, weight2, weight3, out1, out2, out3, width1, width2, width3,
        blocks1, blocks2,
    )  # fmt: skip
    t = tl.program_id(1)
    o = block * BO + tl.arange(0, BO)
    j = tl.arange(0, RP)
    part = tl.arange(0, PP)
    before = tl.load(base + t * width + o, mask=o < width, other=0.0).to(tl.float32)
    own = (o < width)[:, None] & (j < R)[None, :]
    b = tl.load(weight + o[:, None] * R + j[None, :], mask=own, other=0.0).to(tl.float32)
    parts = tl.load(
        low + (part[:, None] * tl.num_programs(1) + t) * STRIDE + which * R + j[None, :],
        mask=(part < PARTS)[:, None] & (j < R)[None, :], other=0.0,
    )  # fmt: skip
    value = _rounded(tl.sum(parts, axis=0), DOT)
    delta = tl.sum(_rounded(b, DOT) * value[None, :], axis=1)
    tl.store(out + t * width + o, narrowed(before + scaling * delta, out.dtype.element_ty), mask=o < width)


@triton.jit
def _slots(index, t, K: tl.constexpr, KP: tl.constexpr):
    """Slot numbers and the experts in them."""
    k = tl.arange(0, KP)
    return k, tl.load(index + t * K + k, mask=k < K, other=0).to(tl.int32)


@triton.jit
def _mix_kernel(
    gate, up, low, gate_B, up_B, down_A, weights, index, mixed, partial, f, low_stride, scaling,
    N: tl.constexpr, R: tl.constexpr, RP: tl.constexpr, K: tl.constexpr, KP: tl.constexpr,
    BF: tl.constexpr, ACT: tl.constexpr, DOT: tl.constexpr,
):  # fmt: skip
    """The mix of the selected experts' hidden states, and this block's share of their down projections.

    Tiles are `[f, slot, rank]`: the rows of the selected experts alone.
    """
    t = tl.program_id(1)
    f_pos = tl.program_id(0) * BF + tl.arange(0, BF)
    f_ok = f_pos < f
    j = tl.arange(0, RP)
    k, expert = _slots(index, t, K, KP)
    weight = tl.load(weights + t * K + k, mask=k < K, other=0.0).to(tl.float32)
    g = tl.load(gate + t * f + f_pos, mask=f_ok, other=0.0).to(tl.float32)
    u = tl.load(up + t * f + f_pos, mask=f_ok, other=0.0).to(tl.float32)
    live = (k < K)[None, :, None] & (j < R)[None, None, :]
    low_at = low + t * low_stride + expert[None, :, None] * R + j[None, None, :]
    low_gate = tl.load(low_at, mask=live, other=0.0)
    low_up = tl.load(low_at + N * R, mask=live, other=0.0)
    tile = f_ok[:, None, None] & live
    b_at = (expert[None, :, None] * f + f_pos[:, None, None]) * R + j[None, None, :]
    b_gate = tl.load(gate_B + b_at, mask=tile, other=0.0).to(tl.float32)
    b_up = tl.load(up_B + b_at, mask=tile, other=0.0).to(tl.float32)
    a_at = (expert[None, :, None] * R + j[None, None, :]) * f + f_pos[:, None, None]
    a = tl.load(down_A + a_at, mask=tile, other=0.0).to(tl.float32)
    delta_g = tl.sum(_rounded(b_gate, DOT) * _rounded(low_gate, DOT), axis=2)
    delta_u = tl.sum(_rounded(b_up, DOT) * _rounded(low_up, DOT), axis=2)
    hidden = activation(g[:, None] + scaling * delta_g, ACT, True) * (u[:, None] + scaling * delta_u)
    hidden = tl.where((k < K)[None, :], hidden * weight[None, :], 0.0)
    m = tl.sum(hidden, axis=1)
    tl.store(mixed + t * f + f_pos, narrowed(m, mixed.dtype.element_ty), mask=f_ok)
    p = tl.sum(_rounded(a, DOT) * _rounded(hidden, DOT)[:, :, None], axis=0)
    at = ((tl.program_id(0) * tl.num_programs(1) + t) * K + k)[:, None] * R + j[None, :]
    tl.store(partial + at, p, mask=(k < K)[:, None] & (j < R)[None, :])


@triton.jit
def _combine_kernel(
    base, low, index, down_B, out, d, scaling, R: tl.constexpr, RP: tl.constexpr,
    K: tl.constexpr, KP: tl.constexpr, BD: tl.constexpr, DOT: tl.constexpr,
):  # fmt: skip
    """`out = base + scaling * sum over k of B_down[expert k] low_k`."""
    t = tl.program_id(1)
    i = tl.program_id(0) * BD + tl.arange(0, BD)
    j = tl.arange(0, RP)
    k, expert = _slots(index, t, K, KP)
    before = tl.load(base + t * d + i, mask=i < d, other=0.0).to(tl.float32)
    live = (k < K)[None, :, None] & (j < R)[None, None, :]
    value = tl.load(low + (t * K + k)[None, :, None] * R + j[None, None, :], mask=live, other=0.0)
    b_at = (expert[None, :, None] * d + i[:, None, None]) * R + j[None, None, :]
    b = tl.load(down_B + b_at, mask=(i < d)[:, None, None] & live, other=0.0).to(tl.float32)
    delta = tl.sum(tl.sum(_rounded(b, DOT) * _rounded(value, DOT), axis=2), axis=1)
    tl.store(out + t * d + i, narrowed(before + scaling * delta, out.dtype.element_ty), mask=i < d)


def takes(tokens: int, r: int = 1, top_k: int = 1) -> bool:
    """Whether these kernels (`project` aside) are for so many tokens, with so many columns at once.

    Args:
        tokens: rows of the input.
        r: rank that a program holds in full.
        top_k: experts whose ranks it holds beside each other.
    """
    columns = next_power_of_2(top_k) * next_power_of_2(r)
    return tokens <= TOKENS and columns <= _COLUMNS and tokens * columns <= _ALL_COLUMNS


def project(x: Tensor, first: Tensor, second: Tensor, third: Tensor) -> tuple[Tensor, Tensor]:
    """See `reference.project`; the weights have one dtype."""
    tokens, d = x.shape
    weights = (first, second, third)
    sizes = [len(weight) for weight in weights]
    out = x.new_empty(tokens, sum(sizes), dtype=torch.float32)
    square_sum = x.new_empty(tokens, dtype=torch.float32)
    blocks = [ceil_div(size, ROWS) for size in sizes]
    _project_kernel[(sum(blocks) + 1, tokens)](
        x.contiguous(), *(weight.contiguous() for weight in weights), out, square_sum, *sizes, *blocks,
        d=d, ROWS=ROWS, DEPTH=min(_DEPTH, next_power_of_2(d)), num_warps=8,
    )  # fmt: skip
    return out, square_sum


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
    f_blocks = ceil_div(f, F_BLOCK)
    mixed = gate.new_empty(gate.shape)
    partial = gate.new_empty(f_blocks, tokens, top_k, r, dtype=torch.float32)
    _mix_kernel[(f_blocks, tokens)](
        *(t.contiguous() for t in (gate, up)), low,
        *(t.contiguous() for t in (gate_B, up_B, down_A, top_k_weights, top_k_index)), mixed, partial,
        f, low.stride(0), scaling,
        N=num_experts, R=r, RP=next_power_of_2(r), K=top_k, KP=next_power_of_2(top_k),
        BF=F_BLOCK, ACT=act, DOT=_DOT_TYPES[gate.dtype], num_warps=4,
    )  # fmt: skip
    return mixed, partial


def combine(base: Tensor, low: Tensor, top_k_index: Tensor, down_B: Tensor, scaling: float) -> Tensor:
    """See `reference.combine`."""
    tokens, d = base.shape
    top_k, r = low.shape[1:]
    out = base.new_empty(base.shape)
    _combine_kernel[(ceil_div(d, OUT_BLOCK), tokens)](
        *(t.contiguous() for t in (base, low, top_k_index, down_B)), out, d, scaling,
        R=r, RP=next_power_of_2(r), K=top_k, KP=next_power_of_2(top_k), BD=OUT_BLOCK,
        DOT=_DOT_TYPES[base.dtype], num_warps=4,
    )  # fmt: skip
    return out
