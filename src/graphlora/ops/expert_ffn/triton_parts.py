"""What the kernels of the expert FFN share: activations, dropout, and how a tile finds its tokens' experts."""

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
def activation(x, ACT: tl.constexpr, FAST: tl.constexpr):
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
def activation_and_slope(x, ACT: tl.constexpr, FAST: tl.constexpr):
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
def routing_weight(weights, ids, t, live, e, K: tl.constexpr):
    """Weight of expert `e` for each token; 0 for tokens that did not select it."""
    w = tl.zeros(t.shape, tl.float32)
    for k in tl.static_range(K):
        chosen = tl.load(ids + t * K + k, mask=live, other=-1) == e
        w += tl.where(chosen, tl.load(weights + t * K + k, mask=live, other=0.0).to(tl.float32), 0.0)
    return w


@triton.jit
def sorted_weight(sorted_weights, position, live, k, K: tl.constexpr):
    """Weight of each row's expert number k, in ascending order of experts; rows as the plan sorted them."""
    return tl.load(sorted_weights + position * K + k, mask=live, other=0).to(tl.float32, bitcast=True)


@triton.jit
def rank_of(ids, t, live, e, K: tl.constexpr):
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
def load_scaled(ptr, mask, scaling):
    """What lies at `ptr`, times s, in its own dtype."""
    x = tl.load(ptr, mask=mask, other=0.0)
    return (x.to(tl.float32) * scaling).to(x.dtype)


@triton.jit
def dot_into(a, b, acc, PRECISE: tl.constexpr):
    if PRECISE:
        out = tl.dot(a.to(tl.float32), b.to(tl.float32), acc, input_precision="ieee")
    else:
        out = tl.dot(a, b, acc)
    return out
