"""Activations inside Triton kernels, with their slopes, in float32; and the rounding of a product's inputs."""

from __future__ import annotations

import triton
import triton.language as tl

from graphlora.ops.backend import interprets_triton

# The interpreter would multiply the bit patterns of bfloat16 numbers.
_INTERPRETED = tl.constexpr(interprets_triton())
# Node features stop here, so that neither they nor their sums over at most 65 neighbors exceed float16's 65504.
_LARGEST = tl.constexpr(8000.0)


@triton.jit
def _tanh(x, PRECISE: tl.constexpr):
    if PRECISE or _INTERPRETED:
        y = 2 * tl.sigmoid(2 * x) - 1
    else:
        y = tl.inline_asm_elementwise(
            "tanh.approx.f32 $0, $1;", "=r,r", [x], dtype=tl.float32, is_pure=True, pack=1
        )
    return y


@triton.jit
def activation(x, ACT: tl.constexpr, PRECISE: tl.constexpr):
    """`act(x)`; where it need not be `PRECISE`, tanh is the GPU's own instruction, off by at most 2^-11 of itself."""
    if ACT == "relu":
        y = tl.maximum(x, 0.0, propagate_nan=tl.PropagateNan.ALL)
    elif ACT == "gelu":
        y = x * (0.5 * tl.erf(x * 0.7071067811865476) + 0.5)
    elif ACT == "gelu_tanh":
        y = 0.5 * x
        y = y * _tanh(x * (0.7978845608028654 + 0.035677408136300125 * x * x), PRECISE) + y
    elif PRECISE:
        y = x * tl.sigmoid(x)
    else:
        y = 0.5 * x
        y = y * _tanh(y, PRECISE) + y
    return y


@triton.jit
def activation_and_slope(x, ACT: tl.constexpr, PRECISE: tl.constexpr):
    """`act(x)` and `act'(x)`."""
    if ACT == "relu":
        y = tl.maximum(x, 0.0, propagate_nan=tl.PropagateNan.ALL)
        s = tl.where(x > 0, 1.0, 0.0)
    elif ACT == "gelu":
        share = 0.5 * tl.erf(x * 0.7071067811865476) + 0.5
        y = x * share
        s = share + x * 0.3989422804014327 * tl.exp(-0.5 * x * x)
    elif ACT == "gelu_tanh":
        square = x * x
        half = 0.5 * x
        th = _tanh(x * (0.7978845608028654 + 0.035677408136300125 * square), PRECISE)
        y = half * th + half
        s = 0.5 + 0.5 * th + half * (1 - th * th) * (0.7978845608028654 + 0.10703222440890037 * square)
    else:
        gate = tl.sigmoid(x) if PRECISE else 0.5 * _tanh(0.5 * x, PRECISE) + 0.5
        y = x * gate
        s = gate + y * (1 - gate)
    return y, s


@triton.jit
def narrowed(x, DTYPE: tl.constexpr):
    """`x` in another floating dtype, rounded to nearest; the interpreter by itself would cut to bfloat16."""
    if _INTERPRETED and tl.bfloat16 == DTYPE and x.dtype == tl.float32:
        bits = x.to(tl.uint32, bitcast=True)
        bits = (bits + 0x7FFF + ((bits >> 16) & 1)) & 0xFFFF0000
        x = bits.to(tl.float32, bitcast=True)
    return x.to(DTYPE)


@triton.jit
def rounded(x, PRECISE: tl.constexpr):
    """A weight or feature as input of a product: as it is where all is float32, else rounded to float16."""
    return x.to(tl.float32) if PRECISE else x.to(tl.float16)


@triton.jit
def bounded(x, PRECISE: tl.constexpr):
    """A node feature as input of a product: like `rounded`, and no larger than float16 can add up."""
    if not PRECISE:
        x = tl.minimum(x, _LARGEST, propagate_nan=tl.PropagateNan.ALL)
    return rounded(x, PRECISE)


@triton.jit
def limited(x, PRECISE: tl.constexpr):
    """A term of node features as input of a product: like `rounded`, and finite where x is."""
    if not PRECISE:
        x = tl.minimum(x, 60000.0, propagate_nan=tl.PropagateNan.ALL)
        x = tl.maximum(x, -60000.0, propagate_nan=tl.PropagateNan.ALL)
    return rounded(x, PRECISE)


@triton.jit
def rounded_gradient(x, PRECISE: tl.constexpr):
    """A gradient (or what one is multiplied with), which may be of any size: float32, or rounded to bfloat16."""
    return x.to(tl.float32) if PRECISE else narrowed(x.to(tl.float32), tl.bfloat16)


@triton.jit
def dot(a, b, acc, PRECISE: tl.constexpr):
    """`acc + a b`, accumulated in float32."""
    if PRECISE or _INTERPRETED:
        acc = tl.dot(a.to(tl.float32), b.to(tl.float32), acc, input_precision="ieee")
    else:
        acc = tl.dot(a, b, acc)
    return acc
