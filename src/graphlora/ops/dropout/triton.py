"""Dropout of a low-rank branch's input in Triton: the dropped input, and its gradient in the product that makes it.

Both draw the mask from the same hash (`reference.py`), so nothing of the size of the input is kept for backward.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from graphlora.ops.backend import interprets_triton
from graphlora.ops.dropout.reference import threshold
from graphlora.ops.operations import launches_kernels, operation
from graphlora.ops.sizes import ceil_div, next_power_of_2
from graphlora.ops.triton_rounding import narrowed

_ROWS, _COLUMNS, _TILE, _REGISTERS = 8, 1024, 128, 128
_library = torch.library.Library("graphlora", "FRAGMENT")


def draw_seed(device: torch.device) -> Tensor:
    """A seed from PyTorch's generator, `[1]`, on the device."""
    return torch.randint(2**31 - 1, (1,), device=device, dtype=torch.int32)


def dropped(x: Tensor, seed: Tensor, p: float, first_column: int = 0) -> Tensor:
    """`mask * x`, without gradients.

    Args:
        x: `[rows, columns]`.
        seed: from `draw_seed`.
        p: probability.
        first_column: what the columns are counted from; parts of one seed must not overlap.
    """
    return operation("dropped", _dropped, x)(x, seed, p, first_column)


def add_dropped_product(
    base: Tensor, low: Tensor, weight: Tensor, seed: Tensor, p: float, first_column: int = 0
) -> Tensor:
    """`base + mask * (low @ weight)`, without gradients: the gradient of x through `dropped(x) @ weight.T`.

    Args:
        base: `[rows, columns]`.
        low: `[rows, n]`, in the dtype of `base`; rows of any stride.
        weight: `[n, columns]`, in the dtype of `base`.
        seed: as `dropped` took it.
        p: likewise.
        first_column: likewise.
    """
    run = operation("add_dropped_product", _add_dropped_product, base)
    return run(base, low, weight, seed, p, first_column)


@triton.jit
def dropout_factor(seed, row, column, THRESHOLD: tl.constexpr, INVERSE: tl.constexpr):
    """0 with probability p, else `1 / (1 - p)`: a hash of seed, token and column, so that backward replays it.

    `THRESHOLD` is `p * 2^32`. `row` and `column` broadcast against each other. (32-bit finalizer of MurmurHash3 without
    its last step, which leaves the high bits as they are.)
    """
    x = (seed.to(tl.uint32) + row.to(tl.uint32) * 0x9E3779B9) ^ (column.to(tl.uint32) * 0x85EBCA6B)
    x = (x ^ (x >> 16)) * 0x85EBCA6B
    x = (x ^ (x >> 13)) * 0xC2B2AE35
    return tl.where(x >= THRESHOLD, INVERSE, 0.0)


@triton.jit(do_not_specialize=["T"])
def dropped_kernel(
    x, seed, out, T, d, stride, first_column,
    BT: tl.constexpr, BD: tl.constexpr, THRESHOLD: tl.constexpr, INVERSE: tl.constexpr,
):  # fmt: skip
    """Grid: (row blocks, column blocks)."""
    t = tl.program_id(0) * BT + tl.arange(0, BT)
    c = tl.program_id(1) * BD + tl.arange(0, BD)
    live = (t < T)[:, None] & (c < d)[None, :]
    value = tl.load(x + t.to(tl.int64)[:, None] * stride + c[None, :], mask=live, other=0.0).to(tl.float32)
    kept = dropout_factor(tl.load(seed), t[:, None], first_column + c[None, :], THRESHOLD, INVERSE)
    tl.store(
        out + t.to(tl.int64)[:, None] * d + c[None, :],
        narrowed(value * kept, out.dtype.element_ty),
        mask=live,
    )


@triton.jit(do_not_specialize=["T"])
def add_dropped_product_kernel(
    base, low, weight, seed, out, T, d, n, base_stride, low_stride, first_column,
    BT: tl.constexpr, BD: tl.constexpr, BK: tl.constexpr, THRESHOLD: tl.constexpr, INVERSE: tl.constexpr,
    PRECISE: tl.constexpr,
):  # fmt: skip
    """Grid: (column blocks, row blocks)."""
    c = tl.program_id(0) * BD + tl.arange(0, BD)
    t = tl.program_id(1) * BT + tl.arange(0, BT)
    row = t.to(tl.int64)
    acc = tl.zeros((BT, BD), tl.float32)
    for start in range(0, n, BK):
        k = start + tl.arange(0, BK)
        left = tl.load(
            low + row[:, None] * low_stride + k[None, :], mask=(t < T)[:, None] & (k < n)[None, :], other=0.0
        )
        right = tl.load(
            weight + k[:, None] * d + c[None, :], mask=(k < n)[:, None] & (c < d)[None, :], other=0.0
        )
        if PRECISE:
            acc = tl.dot(left.to(tl.float32), right.to(tl.float32), acc, input_precision="ieee")
        else:
            acc = tl.dot(left, right, acc)
    live = (t < T)[:, None] & (c < d)[None, :]
    kept = dropout_factor(tl.load(seed), t[:, None], first_column + c[None, :], THRESHOLD, INVERSE)
    value = tl.load(base + row[:, None] * base_stride + c[None, :], mask=live, other=0.0).to(tl.float32)
    tl.store(
        out + row[:, None] * d + c[None, :], narrowed(value + kept * acc, out.dtype.element_ty), mask=live
    )


def _rows(t: Tensor) -> Tensor:
    return t if t.stride(-1) == 1 else t.contiguous()


@launches_kernels
def _dropped(x: Tensor, seed: Tensor, p: float, first_column: int) -> Tensor:
    x = _rows(x)
    tokens, d = x.shape
    out = torch.empty(tokens, d, dtype=x.dtype, device=x.device)
    if out.numel():
        dropped_kernel[(ceil_div(tokens, _ROWS), ceil_div(d, _COLUMNS))](
            x, seed, out, tokens, d, x.stride(0), first_column,
            BT=_ROWS, BD=_COLUMNS, THRESHOLD=threshold(p), INVERSE=1 / (1 - p), num_warps=8,
        )  # fmt: skip
    return out


@launches_kernels
def _add_dropped_product(
    base: Tensor, low: Tensor, weight: Tensor, seed: Tensor, p: float, first_column: int
) -> Tensor:
    base, low, weight = _rows(base), _rows(low), weight.contiguous()
    (tokens, d), n = base.shape, len(weight)
    out = torch.empty(tokens, d, dtype=base.dtype, device=base.device)
    if out.numel():
        # The interpreter's products know no bfloat16.
        precise = base.dtype == torch.float32 or interprets_triton()
        tile = 64 if base.dtype == torch.float32 else _TILE
        add_dropped_product_kernel[(ceil_div(d, tile), ceil_div(tokens, tile))](
            base, low, weight, seed, out, tokens, d, n, base.stride(0), low.stride(0), first_column,
            BT=tile, BD=tile, BK=min(64, max(16, next_power_of_2(n))), THRESHOLD=threshold(p),
            INVERSE=1 / (1 - p), PRECISE=precise, num_warps=8, num_stages=2, maxnreg=_REGISTERS,
        )  # fmt: skip
    return out


_library.define("dropped(Tensor x, Tensor seed, float p, int first_column) -> Tensor")
_library.define(
    "add_dropped_product(Tensor base, Tensor low, Tensor weight, Tensor seed, float p, int first_column) -> Tensor"
)
for _name, _run in (("dropped", _dropped), ("add_dropped_product", _add_dropped_product)):
    for _device in ("CUDA", "CPU"):
        _library.impl(_name, _run, _device)
    torch.library.register_fake(f"graphlora::{_name}", lambda like, *_: like.new_empty(like.shape))
