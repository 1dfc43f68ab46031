"""Triton kernels over the expert nodes: layer 2 of the graph, the routing, and their gradients.

A tile holds the NP node rows (N padded to a power of two) of BT tokens, R = BT * NP rows, row = token * NP + node.
Adding up neighbors is then one product with a block-diagonal `[R, R]` matrix, every layer one product of `[R, g]`.
Node features are made from c, alpha and v (README.md) where they are needed, BK columns at a time.
"""

from __future__ import annotations

import triton
import triton.language as tl

from graphlora.ops.graph_route.triton_act import activation, dot, rounded, slope


@triton.jit
def _neighbors(mix, N, NP: tl.constexpr, R: tl.constexpr, TRANSPOSED: tl.constexpr):
    """Block-diagonal `[R, R]`: what each node row takes from each other row of the same token."""
    r = tl.arange(0, R)
    token, node = r // NP, r % NP
    same = (token[:, None] == token[None, :]) & (node[:, None] < N) & (node[None, :] < N)
    at = node[None, :] * N + node[:, None] if TRANSPOSED else node[:, None] * N + node[None, :]
    return tl.load(mix + at, mask=same, other=0.0)


@triton.jit
def _layer_one(static, alpha_at, vq, t, n, k, T, N, g, SELF: tl.constexpr):
    """`(v, expert rows, token row)` before the activation: `[BT, BK]`, `[BT, NP, BK]`, `[BT, BK]`."""
    live = (t < T)[:, None] & (k < g)[None, :]
    width = 2 * g if SELF else g
    at = t.to(tl.int64)[:, None] * width + k[None, :]
    v = tl.load(vq + at, mask=live, other=0.0)
    c = tl.load(static + n[:, None] * g + k[None, :], mask=(n < N)[:, None] & (k < g)[None, :], other=0.0)
    alpha = tl.load(static + alpha_at + n, mask=n < N, other=0.0)
    experts = c[None, :, :] + alpha[None, :, None] * v[:, None, :]
    token = tl.load(static + N * g + k, mask=k < g, other=0.0)[None, :] + tl.load(static + alpha_at + N) * v
    if SELF:
        token += tl.load(vq + at + g, mask=live, other=0.0)
    return v, experts, token


@triton.jit
def _matrix(w, row, column, g):
    """`w[row, column]` of a `[g, g]` matrix, 0 outside; the two index vectors are broadcast by the caller."""
    return tl.load(w + row * g + column, mask=(row < g) & (column < g), other=0.0)


@triton.jit
def _spread(
    taken, experts, token, link,
    BT: tl.constexpr, NP: tl.constexpr, BK: tl.constexpr, ACT: tl.constexpr, PRECISE: tl.constexpr,
):  # fmt: skip
    """`(H_1, its sum over neighbors)` of the rows, `[R, BK]`, ready for a product."""
    R: tl.constexpr = BT * NP
    h = rounded(tl.reshape(activation(experts, ACT), (R, BK)), PRECISE)
    from_token = tl.reshape(link[None, :, None] * activation(token, ACT)[:, None, :], (R, BK))
    return h, rounded(dot(taken, h, from_token, PRECISE), PRECISE)


@triton.jit
def _expert_rows(
    static, vq, conv, self_weight, features, t, first, T, N, g,
    BT: tl.constexpr, NP: tl.constexpr, G: tl.constexpr, BK: tl.constexpr, ACT: tl.constexpr,
    SELF: tl.constexpr, RESIDUAL: tl.constexpr, PRECISE: tl.constexpr, KEEP: tl.constexpr,
):  # fmt: skip
    """Layer 2 before its activation, `[R, G]`; `KEEP` writes its inputs, `[H_1 summed over neighbors | H_1]`."""
    R: tl.constexpr = BT * NP
    n = tl.arange(0, NP)
    j = tl.arange(0, G)
    mix_at = (2 * N + 1) * g
    alpha_at = mix_at + N * N + N
    taken = rounded(_neighbors(static + mix_at, N, NP, R, False), PRECISE)
    link = tl.load(static + mix_at + N * N + n, mask=n < N, other=0.0)
    acc = tl.zeros((R, G), tl.float32)
    for start in range(0, G, BK):
        k = start + tl.arange(0, BK)
        _, experts, token = _layer_one(static, alpha_at, vq, t, n, k, T, N, g, SELF)
        h, spread = _spread(taken, experts, token, link, BT, NP, BK, ACT, PRECISE)
        acc = dot(spread, rounded(_matrix(conv + g * g, j[None, :], k[:, None], g), PRECISE), acc, PRECISE)
        if SELF:
            acc = dot(
                h, rounded(_matrix(self_weight + g * g, j[None, :], k[:, None], g), PRECISE), acc, PRECISE
            )
        if KEEP:
            at, live = _scratch_rows(t, first, n, T, N, BT, NP)
            at = at[:, None] * (2 * g if SELF else g) + k[None, :]
            live = live[:, None] & (k < g)[None, :]
            tl.store(features + at, spread, mask=live)
            if SELF:
                tl.store(features + at + g, h, mask=live)
    if RESIDUAL:
        at = static + (N + 1) * g + n[:, None] * g + j[None, :]
        first = tl.load(at, mask=(n < N)[:, None] & (j < g)[None, :], other=0.0)
        acc += tl.reshape(tl.broadcast_to(first[None, :, :], (BT, NP, G)), (R, G))
    return acc


@triton.jit
def _scratch_rows(t, first, n, T, N, BT: tl.constexpr, NP: tl.constexpr):
    """Row of each (token, node) in scratch tensors that begin with token `first`, and whether it exists."""
    at = tl.reshape((t - first)[:, None] * N + n[None, :], (BT * NP,))
    live = tl.reshape((t < T)[:, None] & (n < N)[None, :], (BT * NP,))
    return at, live


@triton.jit
def nodes_forward_kernel(
    static, vq, conv, self_weight, out, offset, logits, probs, weights, index, T, N, g,
    BT: tl.constexpr, NP: tl.constexpr, G: tl.constexpr, BK: tl.constexpr, K: tl.constexpr, KP: tl.constexpr,
    ACT: tl.constexpr, SELF: tl.constexpr, RESIDUAL: tl.constexpr, OFFSET: tl.constexpr, NORMALIZE: tl.constexpr,
    PRECISE: tl.constexpr,
):  # fmt: skip
    """Logits, softmax, the K largest (ties to the lowest index) and their weights for BT tokens."""
    t = tl.program_id(0) * BT + tl.arange(0, BT)
    n = tl.arange(0, NP)
    j = tl.arange(0, G)
    acc = _expert_rows(
        static, vq, conv, self_weight, static, t, 0, T, N, g,
        BT, NP, G, BK, ACT, SELF, RESIDUAL, PRECISE, False,
    )  # fmt: skip
    p = tl.load(out + j, mask=j < g, other=0.0).to(tl.float32)
    logit = tl.reshape(tl.sum(activation(acc, ACT) * p[None, :], axis=1), (BT, NP))
    if OFFSET:
        logit -= tl.load(offset + n, mask=n < N, other=0.0)[None, :]
    at = t[:, None] * N + n[None, :]
    live = (t < T)[:, None] & (n < N)[None, :]
    tl.store(logits + at, logit, mask=live)
    logit = tl.where((n < N)[None, :], logit, float("-inf"))
    prob = tl.exp(logit - tl.max(logit, axis=1)[:, None])
    prob = prob / tl.sum(prob, axis=1)[:, None]
    tl.store(probs + at, prob, mask=live)

    slot = tl.arange(0, KP)
    rest = tl.where((n < N)[None, :], prob, -1.0)
    chosen = tl.zeros((BT, KP), tl.float32)
    expert = tl.zeros((BT, KP), tl.int32)
    for i in tl.static_range(K):
        value, where = tl.max(rest, axis=1, return_indices=True)
        here = slot[None, :] == i
        chosen = tl.where(here, value[:, None], chosen)
        # A token that is not a number selects an expert all the same.
        expert = tl.where(here, tl.minimum(where, N - 1)[:, None], expert)
        rest = tl.where(n[None, :] == where[:, None], -2.0, rest)
    if NORMALIZE:
        chosen = chosen / tl.sum(chosen, axis=1)[:, None]
    at = t[:, None] * K + slot[None, :]
    live = (t < T)[:, None] & (slot < K)[None, :]
    tl.store(weights + at, chosen, mask=live)
    tl.store(index + at, expert.to(tl.int64), mask=live)


@triton.jit
def _logit_gradient(
    probs, index, grad_logits, grad_probs, grad_weights, t, n, T, N,
    K: tl.constexpr, LOGITS: tl.constexpr, PROBS: tl.constexpr, WEIGHTS: tl.constexpr, NORMALIZE: tl.constexpr,
):  # fmt: skip
    """Gradient of the logits `[BT, NP]` from those of logits, probabilities and weights; each may be absent."""
    at = t[:, None] * N + n[None, :]
    live = (t < T)[:, None] & (n < N)[None, :]
    prob = tl.load(probs + at, mask=live, other=0.0)
    grad = tl.zeros(prob.shape, tl.float32)
    if PROBS:
        grad += tl.load(grad_probs + at, mask=live, other=0.0)
    if WEIGHTS:
        selected = tl.zeros(prob.shape, tl.float32)
        taken = tl.zeros(prob.shape, tl.float32)
        for i in tl.static_range(K):
            where = tl.load(index + t * K + i, mask=t < T, other=-1)
            value = tl.load(grad_weights + t * K + i, mask=t < T, other=0.0)
            here = n[None, :] == where[:, None]
            taken = tl.where(here, 1.0, taken)
            selected = tl.where(here, value[:, None], selected)
        if NORMALIZE:
            total = tl.sum(prob * taken, axis=1)
            total = tl.where(total > 0, total, 1.0)[:, None]
            mean = tl.sum(selected * prob, axis=1)[:, None] / total
            selected = taken * (selected - mean) / total
        grad += selected
    grad = prob * (grad - tl.sum(grad * prob, axis=1)[:, None])
    if LOGITS:
        grad += tl.load(grad_logits + at, mask=live, other=0.0)
    return grad


@triton.jit
def rows_backward_kernel(
    static, vq, conv, self_weight, out, probs, index, grad_logits, grad_probs, grad_weights,
    grad_rows, features, partial, first, T, N, g, rows,
    BT: tl.constexpr, NP: tl.constexpr, G: tl.constexpr, BK: tl.constexpr, K: tl.constexpr,
    ACT: tl.constexpr, SELF: tl.constexpr, RESIDUAL: tl.constexpr, LOGITS: tl.constexpr, PROBS: tl.constexpr,
    WEIGHTS: tl.constexpr, NORMALIZE: tl.constexpr, PRECISE: tl.constexpr,
):  # fmt: skip
    """What the weight gradients of layer 2 are made of, and this tile's share of those of p and the residual's rows.

    Writes `grad_rows` `[T' N, g]`, the gradient of layer 2 before its activation, and its inputs, `features`
    `[T' N, g or 2 g]`, both of the T' tokens of this call, from token `first` to before token T. `partial` is
    `[tiles, rows, g]`: gradients of c (N + 1 rows, from the other kernel), of p and of the residual's rows (N).
    """
    R: tl.constexpr = BT * NP
    tile = first // BT + tl.program_id(0)
    t = tile * BT + tl.arange(0, BT)
    n = tl.arange(0, NP)
    j = tl.arange(0, G)
    acc = _expert_rows(
        static, vq, conv, self_weight, features, t, first, T, N, g,
        BT, NP, G, BK, ACT, SELF, RESIDUAL, PRECISE, True,
    )  # fmt: skip
    grad = _logit_gradient(
        probs, index, grad_logits, grad_probs, grad_weights, t, n, T, N, K, LOGITS, PROBS, WEIGHTS, NORMALIZE
    )
    grad = tl.reshape(grad, (R,))
    own = partial + tile.to(tl.int64) * rows * g
    tl.store(own + (N + 1) * g + j, tl.sum(grad[:, None] * activation(acc, ACT), axis=0), mask=j < g)
    p = tl.load(out + j, mask=j < g, other=0.0).to(tl.float32)
    d_rows = grad[:, None] * p[None, :] * slope(acc, ACT)
    if RESIDUAL:
        total = tl.sum(tl.reshape(d_rows, (BT, NP, G)), axis=0)
        inside = (n < N)[:, None] & (j < g)[None, :]
        tl.store(own + (N + 2) * g + n[:, None] * g + j[None, :], total, mask=inside)
    at, live = _scratch_rows(t, first, n, T, N, BT, NP)
    live = live[:, None] & (j < g)[None, :]
    tl.store(grad_rows + at[:, None] * g + j[None, :], rounded(d_rows, PRECISE), mask=live)


@triton.jit
def nodes_backward_kernel(
    static, vq, conv, self_weight, grad_rows, grad_vq, partial, edges, first, T, N, g, rows,
    BT: tl.constexpr, NP: tl.constexpr, G: tl.constexpr, BK: tl.constexpr, ACT: tl.constexpr,
    SELF: tl.constexpr, EDGES: tl.constexpr, PRECISE: tl.constexpr,
):  # fmt: skip
    """BK columns of the gradients of v and q `[T, g or 2 g]`, and this tile's share of those of c and of the graph.

    `edges` is `[tiles, blocks of columns, N N + N + N + 1]`: gradients of mix, link and alpha.
    """
    R: tl.constexpr = BT * NP
    tile = first // BT + tl.program_id(0)
    t = tile * BT + tl.arange(0, BT)
    n = tl.arange(0, NP)
    k = tl.program_id(1) * BK + tl.arange(0, BK)
    mix_at = (2 * N + 1) * g
    alpha_at = mix_at + N * N + N
    width = 2 * g if SELF else g
    at, live = _scratch_rows(t, first, n, T, N, BT, NP)
    d_spread = tl.zeros((R, BK), tl.float32)
    d_h = tl.zeros((R, BK), tl.float32)
    for start in range(0, G, BK):
        j = start + tl.arange(0, BK)
        d_rows = tl.load(
            grad_rows + at[:, None] * g + j[None, :], mask=live[:, None] & (j < g)[None, :], other=0.0
        )
        d_spread = dot(
            d_rows, rounded(_matrix(conv + g * g, j[:, None], k[None, :], g), PRECISE), d_spread, PRECISE
        )
        if SELF:
            d_h = dot(
                d_rows,
                rounded(_matrix(self_weight + g * g, j[:, None], k[None, :], g), PRECISE),
                d_h,
                PRECISE,
            )
    taken = rounded(_neighbors(static + mix_at, N, NP, R, True), PRECISE)
    d_h = dot(taken, rounded(d_spread, PRECISE), d_h, PRECISE)

    link = tl.load(static + mix_at + N * N + n, mask=n < N, other=0.0)
    alpha = tl.load(static + alpha_at + n, mask=n < N, other=0.0)
    v, experts, token = _layer_one(static, alpha_at, vq, t, n, k, T, N, g, SELF)
    d_spread3 = tl.reshape(d_spread, (BT, NP, BK))
    d_experts = tl.reshape(d_h, (BT, NP, BK)) * slope(experts, ACT)
    d_token = tl.sum(link[None, :, None] * d_spread3, axis=1) * slope(token, ACT)
    d_v = tl.sum(alpha[None, :, None] * d_experts, axis=1) + tl.load(static + alpha_at + N) * d_token
    vq_at = t.to(tl.int64)[:, None] * width + k[None, :]
    inside = (t < T)[:, None] & (k < g)[None, :]
    tl.store(grad_vq + vq_at, rounded(d_v, PRECISE), mask=inside)
    if SELF:
        tl.store(grad_vq + vq_at + g, rounded(d_token, PRECISE), mask=inside)
    own = partial + tile.to(tl.int64) * rows * g
    c_at = own + n[:, None] * g + k[None, :]
    tl.store(c_at, tl.sum(d_experts, axis=0), mask=(n < N)[:, None] & (k < g)[None, :])
    tl.store(own + N * g + k, tl.sum(d_token, axis=0), mask=k < g)
    if EDGES:
        h = rounded(tl.reshape(activation(experts, ACT), (R, BK)), PRECISE)
        d_mix = dot(rounded(d_spread, PRECISE), tl.trans(h), tl.zeros((R, R), tl.float32), PRECISE)
        r = tl.arange(0, R)
        d_mix = tl.where((r // NP)[:, None] == (r // NP)[None, :], d_mix, 0.0)
        d_mix = tl.sum(tl.sum(tl.reshape(d_mix, (BT, NP, BT, NP)), axis=2), axis=0)
        own = edges + (tile * tl.num_programs(1) + tl.program_id(1)) * (N * N + 2 * N + 1)
        tl.store(own + n[:, None] * N + n[None, :], d_mix, mask=(n < N)[:, None] & (n < N)[None, :])
        d_link = tl.sum(tl.sum(d_spread3 * activation(token, ACT)[:, None, :], axis=2), axis=0)
        tl.store(own + N * N + n, d_link, mask=n < N)
        d_alpha = tl.sum(tl.sum(d_experts * v[:, None, :], axis=2), axis=0)
        tl.store(own + N * N + N + n, d_alpha, mask=n < N)
        tl.store(own + N * N + 2 * N, tl.sum(tl.sum(d_token * v, axis=1), axis=0))
