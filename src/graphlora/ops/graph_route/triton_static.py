"""Triton kernels for what does not depend on the token: the normalized graph, c, their gradients; and sums of squares.

The forward kernel does several small things side by side, because each alone is little more than its launch. What it
leaves is one float32 buffer, `static`: c `[N + 1, g]`, the residual's rows of layer 2 `[N, g]`, the neighbors' shares
`mix` `[N, N]` and the token's `link` `[N]` in layer 2, and `alpha` `[N + 1]`.
"""

from __future__ import annotations

import triton
import triton.language as tl

from graphlora.ops.graph_route.triton_act import activation, activation_and_slope, narrowed


@triton.jit
def _normalized(adjacency, N, NQ: tl.constexpr, GIVEN: tl.constexpr):
    """`Â` of N experts and the token, `[NQ, NQ]`; `GIVEN` where `adjacency` is `Â` already."""
    n = tl.arange(0, NQ)[:, None]
    m = tl.arange(0, NQ)[None, :]
    inside = (n <= N) & (m <= N)
    if GIVEN:
        full = tl.load(adjacency + n * (N + 1) + m, mask=inside, other=0.0)
    else:
        full = tl.load(adjacency + n * N + m, mask=(n < N) & (m < N), other=0.0)
        full = tl.where(inside & ((n == N) | (m == N) | (n == m)), 1.0, full)
        degree = tl.sum(full, axis=1)
        inverse = tl.rsqrt(tl.where(degree > 0, degree, 1.0))
        full = inverse[:, None] * full * inverse[None, :]
    return full


@triton.jit
def _eye(N, NQ: tl.constexpr):
    n = tl.arange(0, NQ)
    return tl.where((n[:, None] == n[None, :]) & (n <= N)[:, None], 1.0, 0.0)


@triton.jit
def _block(w, row, column, rows, columns):
    """`w[row, column]` of a `[rows, columns]` matrix in float32, 0 outside."""
    live = (row < rows) & (column < columns)
    return tl.load(w + row * columns + column, mask=live, other=0.0).to(tl.float32)


@triton.jit
def _exact(a, b, acc):
    """`acc + a b` in float32; large products as three of TF32, which keep 21 bits and compile in seconds."""
    if a.shape[0] * a.shape[1] * b.shape[1] <= 16384:
        acc = tl.dot(a, b, acc, input_precision="ieee")
    else:
        acc = tl.dot(a, b, acc, input_precision="tf32x3")
    return acc


@triton.jit
def _static_part(
    block, features, conv, self_weight, adjacency, static, residual, N, g,
    NQ: tl.constexpr, BJ: tl.constexpr, BK: tl.constexpr, ACT: tl.constexpr, SELF: tl.constexpr,
    RESIDUAL: tl.constexpr, GIVEN: tl.constexpr,
):  # fmt: skip
    """Columns `block * BJ` and on of c and of the residual's rows; the first block also writes the graph."""
    n = tl.arange(0, NQ)
    j = block * BJ + tl.arange(0, BJ)
    graph = _normalized(adjacency, N, NQ, GIVEN)
    mixing = (1 - residual) * graph + residual * _eye(N, NQ)
    c = tl.zeros((NQ, BJ), tl.float32)
    rows = tl.zeros((NQ, BJ), tl.float32)
    for start in range(0, g, BK):
        k = start + tl.arange(0, BK)
        nodes = activation(_block(features, n[:, None], k[None, :], N, g), ACT, True)
        mixed = _exact(mixing, nodes, tl.zeros((NQ, BK), tl.float32))
        c = _exact(mixed, _block(conv, j[None, :], k[:, None], g, g), c)
        if SELF:
            c = _exact(nodes, _block(self_weight, j[None, :], k[:, None], g, g), c)
        if RESIDUAL:
            rows = _exact(nodes, _block(conv + g * g, j[None, :], k[:, None], g, g), rows)
    tl.store(static + n[:, None] * g + j[None, :], c, mask=(n <= N)[:, None] & (j < g)[None, :])
    if RESIDUAL:
        at = static + (N + 1 + n[:, None]) * g + j[None, :]
        tl.store(at, residual * rows, mask=(n < N)[:, None] & (j < g)[None, :])
    if block == 0:
        mix_at = static + (2 * N + 1) * g
        later = (1 - residual) * graph
        experts = (n < N)[:, None] & (n < N)[None, :]
        tl.store(mix_at + n[:, None] * N + n[None, :], later, mask=experts)
        to_token = (n == N)[None, :]
        tl.store(mix_at + N * N + n, tl.sum(tl.where(to_token, later, 0.0), axis=1), mask=n < N)
        tl.store(mix_at + N * N + N + n, tl.sum(tl.where(to_token, mixing, 0.0), axis=1), mask=n <= N)


@triton.jit
def _square_sums(block, x, square_sum, T, d, BR: tl.constexpr, BD: tl.constexpr):
    t = block * BR + tl.arange(0, BR)
    total = tl.zeros((BR, BD), tl.float32)
    for start in range(0, d, BD):
        k = start + tl.arange(0, BD)
        at = t.to(tl.int64)[:, None] * d + k[None, :]
        part = tl.load(x + at, mask=(t < T)[:, None] & (k < d)[None, :], other=0.0).to(tl.float32)
        total += part * part
    tl.store(square_sum + t, tl.sum(total, axis=1), mask=t < T)


@triton.jit
def _rounded_copy(block, source, target, size, BLOCK: tl.constexpr):
    at = block * BLOCK + tl.arange(0, BLOCK)
    live = at < size
    tl.store(
        target + at, narrowed(tl.load(source + at, mask=live, other=0.0), target.dtype.element_ty), mask=live
    )


@triton.jit
def prepare_kernel(
    features, conv, self_weight, adjacency, static, proj, proj_rounded, conv_rounded, self_rounded, x, square_sum,
    residual, T, d, N, g, static_blocks, proj_size, proj_blocks, conv_size, conv_blocks, self_blocks,
    NQ: tl.constexpr, BJ: tl.constexpr, BK: tl.constexpr, BR: tl.constexpr, BD: tl.constexpr, BLOCK: tl.constexpr,
    ACT: tl.constexpr, SELF: tl.constexpr, RESIDUAL: tl.constexpr, GIVEN: tl.constexpr,
):  # fmt: skip
    """The static part, weights rounded for the products, and the tokens' sums of squares, each by its own programs."""
    block = tl.program_id(0)
    proj_from = static_blocks
    conv_from = proj_from + proj_blocks
    self_from = conv_from + conv_blocks
    rows_from = self_from + self_blocks
    if block < proj_from:
        _static_part(
            block, features, conv, self_weight, adjacency, static, residual, N, g,
            NQ, BJ, BK, ACT, SELF, RESIDUAL, GIVEN,
        )  # fmt: skip
    elif block < conv_from:
        _rounded_copy(block - proj_from, proj, proj_rounded, proj_size, BLOCK)
    elif block < self_from:
        _rounded_copy(block - conv_from, conv, conv_rounded, conv_size, BLOCK)
    elif block < rows_from:
        _rounded_copy(block - self_from, self_weight, self_rounded, conv_size, BLOCK)
    else:
        _square_sums(block - rows_from, x, square_sum, T, d, BR, BD)


@triton.jit
def static_backward_kernel(
    features, conv, self_weight, adjacency, sums, first_layer, second_layer,
    grad_features, grad_conv, grad_self, grad_out, grad_mixing, residual, N, g, rows,
    NQ: tl.constexpr, BI: tl.constexpr, BK: tl.constexpr, ACT: tl.constexpr, SELF: tl.constexpr,
    RESIDUAL: tl.constexpr, GIVEN: tl.constexpr, EDGES: tl.constexpr,
):  # fmt: skip
    """Input columns `BI` of every weight gradient, put together from the tokens' part and the static part.

    `sums` is `[rows, g]`: gradients of c (N + 1 rows), of p and of the residual's rows. `first_layer` is
    `[g or 2 g, g]`, `[dW_1; dS_1]` from the tokens; `second_layer` `[g, g or 2 g]`, `[dW_2 | dS_2]`. `grad_mixing` is
    `[blocks, N + 1, N]`, this block's share of the gradient of layer 1's mixing of the expert nodes.
    """
    block = tl.program_id(0)
    n = tl.arange(0, NQ)
    i = block * BI + tl.arange(0, BI)
    width = 2 * g if SELF else g
    mixing = (1 - residual) * _normalized(adjacency, N, NQ, GIVEN) + residual * _eye(N, NQ)
    nodes, slope = activation_and_slope(_block(features, n[:, None], i[None, :], N, g), ACT, True)
    mixed = _exact(mixing, nodes, tl.zeros((NQ, BI), tl.float32))
    d_mixed = tl.zeros((NQ, BI), tl.float32)
    d_nodes = tl.zeros((NQ, BI), tl.float32)
    for start in range(0, g, BK):
        j = start + tl.arange(0, BK)
        at = j[:, None] * g + i[None, :]
        live = (j < g)[:, None] & (i < g)[None, :]
        d_c = _block(sums, n[:, None], j[None, :], N + 1, g)
        d_mixed = _exact(d_c, _block(conv, j[:, None], i[None, :], g, g), d_mixed)
        first = _exact(tl.trans(d_c), mixed, _block(first_layer, j[:, None], i[None, :], g, g))
        tl.store(grad_conv + at, narrowed(first, grad_conv.dtype.element_ty), mask=live)
        second = tl.load(second_layer + j[:, None] * width + i[None, :], mask=live, other=0.0)
        if RESIDUAL:
            d_rows = residual * _block(sums + (N + 2) * g, n[:, None], j[None, :], N, g)
            second = _exact(tl.trans(d_rows), nodes, second)
            d_nodes = _exact(d_rows, _block(conv + g * g, j[:, None], i[None, :], g, g), d_nodes)
        tl.store(grad_conv + g * g + at, narrowed(second, grad_conv.dtype.element_ty), mask=live)
        if SELF:
            d_own = tl.where((n < N)[:, None], d_c, 0.0)
            d_nodes = _exact(d_own, _block(self_weight, j[:, None], i[None, :], g, g), d_nodes)
            first = _block(first_layer + g * g, j[:, None], i[None, :], g, g)
            first = _exact(tl.trans(d_own), nodes, first)
            tl.store(grad_self + at, narrowed(first, grad_self.dtype.element_ty), mask=live)
            second = tl.load(second_layer + j[:, None] * width + g + i[None, :], mask=live, other=0.0)
            tl.store(grad_self + g * g + at, narrowed(second, grad_self.dtype.element_ty), mask=live)
    d_nodes = _exact(tl.trans(mixing), d_mixed, d_nodes)
    d_own = d_nodes * slope
    at = n[:, None] * g + i[None, :]
    live = (n < N)[:, None] & (i < g)[None, :]
    tl.store(grad_features + at, narrowed(d_own, grad_features.dtype.element_ty), mask=live)
    p = tl.load(sums + (N + 1) * g + i, mask=i < g, other=0.0)
    tl.store(grad_out + i, narrowed(p, grad_out.dtype.element_ty), mask=i < g)
    if EDGES:
        share = _exact(d_mixed, tl.trans(nodes), tl.zeros((NQ, NQ), tl.float32))
        at = grad_mixing + block * (N + 1) * N + n[:, None] * N + n[None, :]
        tl.store(at, share, mask=(n <= N)[:, None] & (n < N)[None, :])
