"""Activations inside Triton kernels, with their slopes, in float32; and the rounding of a product's inputs."""

from __future__ import annotations

import triton
import triton.language as tl

from graphlora.ops.backend import interprets_triton
from graphlora.ops.triton_rounding import narrowed

# The interpreter would multiply the bit patterns of bfloat16 numbers.
_INTERPRETED = tl.constexpr(interprets_triton())


@triton.jit
def activation(x, ACT: tl.constexpr):
    """`act(x)`."""
    if ACT == "relu":
        y = tl.maximum(x, 0.0)
    elif ACT == "gelu":
        y = x * (0.5 * tl.erf(x * 0.7071067811865476) + 0.5)
    elif ACT == "gelu_tanh":
        y = x * tl.sigmoid(x * (1.5957691216057308 + 0.07135481627260025 * x * x))
    else:
        y = x * tl.sigmoid(x)
    return y


@triton.jit
def slope(x, ACT: tl.constexpr):
    """`act'(x)`."""
    if ACT == "relu":
        s = tl.where(x > 0, 1.0, 0.0)
    elif ACT == "gelu":
        s = 0.5 * tl.erf(x * 0.7071067811865476) + 0.5 + x * 0.3989422804014327 * tl.exp(-0.5 * x * x)
    elif ACT == "gelu_tanh":
        gate = tl.sigmoid(x * (1.5957691216057308 + 0.07135481627260025 * x * x))
        s = gate + x * gate * (1 - gate) * (1.5957691216057308 + 0.21406444881780075 * x * x)
    else:
        gate = tl.sigmoid(x)
        s = gate * (1 + x * (1 - gate))
    return s


@triton.jit
def rounded(x, PRECISE: tl.constexpr):
    """Input of a product: as it is where all is float32, else rounded to bfloat16."""
    return x.to(tl.float32) if PRECISE else narrowed(x, tl.bfloat16)


@triton.jit
def dot(a, b, acc, PRECISE: tl.constexpr):
    """`acc + a b`, accumulated in float32."""
    if PRECISE or _INTERPRETED:
        acc = tl.dot(a.to(tl.float32), b.to(tl.float32), acc, input_precision="ieee")
    else:
        acc = tl.dot(a, b, acc)
    return acc
