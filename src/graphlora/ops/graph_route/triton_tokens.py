"""Triton kernels over tokens alone: from `z = x P_x^T` to v and back, and the gradient of x."""

from __future__ import annotations

import triton
import triton.language as tl

from graphlora.ops.graph_route.triton_act import (
    activation,
    activation_and_slope,
    bounded,
    dot,
    narrowed,
    rounded,
    rounded_gradient,
)


@triton.jit
def _inverse_rms(square_sum, t, T, d, eps):
    return tl.rsqrt(tl.load(square_sum + t, mask=t < T, other=0.0) / d + eps)


@triton.jit
def tokens_forward_kernel(
    z, square_sum, conv, self_weight, vq, T, d, eps, z_stride, g,
    BT: tl.constexpr, G: tl.constexpr, BJ: tl.constexpr, BK: tl.constexpr, ACT: tl.constexpr,
    SELF: tl.constexpr, NORM: tl.constexpr, PRECISE: tl.constexpr,
):  # fmt: skip
    """`v = x' W_1^T`, and beside it `q = x' S_1^T` where there is a self weight; x' = act(z / rms(x))."""
    t = tl.program_id(0) * BT + tl.arange(0, BT)
    j = tl.program_id(1) * BJ + tl.arange(0, BJ)
    which = tl.program_id(2)
    matrix = conv
    if which == 1:
        matrix = self_weight
    acc = tl.zeros((BT, BJ), tl.float32)
    for start in range(0, G, BK):
        k = start + tl.arange(0, BK)
        live = (t < T)[:, None] & (k < g)[None, :]
        y = tl.load(z + t.to(tl.int64)[:, None] * z_stride + k[None, :], mask=live, other=0.0)
        if NORM:
            y *= _inverse_rms(square_sum, t, T, d, eps)[:, None]
        at = j[None, :] * g + k[:, None]
        inside = (j < g)[None, :] & (k < g)[:, None]
        w = tl.load(matrix + at, mask=inside, other=0.0)
        acc = dot(bounded(activation(y, ACT, PRECISE), PRECISE), rounded(w, PRECISE), acc, PRECISE)
    width = 2 * g if SELF else g
    at = t.to(tl.int64)[:, None] * width + which * g + j[None, :]
    tl.store(vq + at, acc, mask=(t < T)[:, None] & (j < g)[None, :])


@triton.jit
def tokens_backward_kernel(
    z, square_sum, conv, self_weight, grad_vq, features, grad_z, pull, T, d, eps, g,
    BT: tl.constexpr, G: tl.constexpr, BI: tl.constexpr, BK: tl.constexpr, ACT: tl.constexpr,
    SELF: tl.constexpr, NORM: tl.constexpr, PRECISE: tl.constexpr,
):  # fmt: skip
    """Gradient of z, x' again for the gradient of W_1, and what the normalization pulls x towards zero by.

    With `r = 1 / rms(x)` and `y = r z`: `dx = (r dy) P_x - r^2 <dy, y> / d * x`, because scaling x changes nothing.
    `pull` is `[blocks of BI columns, T]`, each block's share of the second factor.
    """
    t = tl.program_id(0) * BT + tl.arange(0, BT)
    i = tl.program_id(1) * BI + tl.arange(0, BI)
    width = 2 * g if SELF else g
    acc = tl.zeros((BT, BI), tl.float32)
    for start in range(0, G, BK):
        j = start + tl.arange(0, BK)
        live = (t < T)[:, None] & (j < g)[None, :]
        at = t.to(tl.int64)[:, None] * width + j[None, :]
        weight_at = j[:, None] * g + i[None, :]
        inside = (j < g)[:, None] & (i < g)[None, :]
        w = rounded_gradient(tl.load(conv + weight_at, mask=inside, other=0.0), PRECISE)
        acc = dot(tl.load(grad_vq + at, mask=live, other=0.0), w, acc, PRECISE)
        if SELF:
            w = rounded_gradient(tl.load(self_weight + weight_at, mask=inside, other=0.0), PRECISE)
            acc = dot(tl.load(grad_vq + at + g, mask=live, other=0.0), w, acc, PRECISE)
    live = (t < T)[:, None] & (i < g)[None, :]
    at = t.to(tl.int64)[:, None] * g + i[None, :]
    y = tl.load(z + at, mask=live, other=0.0)
    if NORM:
        inverse = _inverse_rms(square_sum, t, T, d, eps)
        y *= inverse[:, None]
    feature, slope = activation_and_slope(y, ACT, PRECISE)
    tl.store(features + at, rounded_gradient(feature, PRECISE), mask=live)
    grad = acc * slope
    if NORM:
        share = inverse * inverse * tl.sum(grad * y, axis=1) / d
        tl.store(pull + tl.program_id(1).to(tl.int64) * T + t, share, mask=t < T)
        grad *= inverse[:, None]
    tl.store(grad_z + at, narrowed(grad, grad_z.dtype.element_ty), mask=live)


@triton.jit
def input_gradient_kernel(
    grad_z, proj, pull, x, grad_x, T, d, g, columns,
    BT: tl.constexpr, BD: tl.constexpr, G: tl.constexpr, PULLS: tl.constexpr, STAGES: tl.constexpr,
    NORM: tl.constexpr, PRECISE: tl.constexpr,
):  # fmt: skip
    """`dx = dz P_x - pull * x`: the product ends where x is read anyway.

    A program keeps the dz of its tokens and takes `columns` of the d columns, BD at a time: reading both dz and P_x
    again for every tile would take longer than x and dx do.
    """
    t = tl.program_id(1) * BT + tl.arange(0, BT)
    i = tl.arange(0, G)
    row = t.to(tl.int64)[:, None]
    left = tl.load(grad_z + row * g + i[None, :], mask=(t < T)[:, None] & (i < g)[None, :], other=0.0)
    share = tl.zeros((BT,), tl.float32)
    if NORM:
        for part in tl.static_range(PULLS):
            share += tl.load(pull + part * T + t, mask=t < T, other=0.0)
    first = tl.program_id(0) * columns
    for start in tl.range(first, first + columns, BD, num_stages=STAGES):
        k = start + tl.arange(0, BD)
        right = tl.load(
            proj + i[:, None] * d + k[None, :], mask=(i < g)[:, None] & (k < d)[None, :], other=0.0
        )
        at = row * d + k[None, :]
        live = (t < T)[:, None] & (k < d)[None, :]
        acc = dot(left, right, tl.zeros((BT, BD), tl.float32), PRECISE)
        if NORM:
            acc -= share[:, None] * tl.load(x + at, mask=live, other=0.0).to(tl.float32)
        tl.store(grad_x + at, narrowed(acc, grad_x.dtype.element_ty), mask=live)
