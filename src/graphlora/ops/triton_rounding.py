"""Rounding to narrower numbers inside Triton kernels, the same in the interpreter."""

from __future__ import annotations

import triton
import triton.language as tl

from graphlora.ops.backend import interprets_triton

_INTERPRETED = tl.constexpr(interprets_triton())


@triton.jit
def narrowed(x, DTYPE: tl.constexpr):
    """`x` in another floating dtype, rounded to nearest; the interpreter by itself would cut to bfloat16."""
    if _INTERPRETED and tl.bfloat16 == DTYPE and x.dtype == tl.float32:
        bits = x.to(tl.uint32, bitcast=True)
        bits = (bits + 0x7FFF + ((bits >> 16) & 1)) & 0xFFFF0000
        x = bits.to(tl.float32, bitcast=True)
    return x.to(DTYPE)
