"""Triton kernels over the expert nodes: layer 2 of the graph, the routing, and their gradients.

A tile holds the NP node rows (N padded to a power of two) of BT tokens, R = BT * NP rows, row = token * NP + node.
Adding up neighbors is then one product with a block-diagonal `[R, R]` matrix, every layer one product of `[R, g]`;
sums over the nodes of a token or over the tokens of a node are small products too, because sums across threads cost
more instructions. The token nodes have rows of their own, BT padded to TP. Node features are made from c, alpha and v
(README.md) where they are needed, BK columns at a time.
"""

from __future__ import annotations

import triton
import triton.language as tl

from graphlora.ops.graph_route.triton_act import (
    activation,
    activation_and_slope,
    bounded,
    dot,
    limited,
    rounded,
    rounded_gradient,
)


@triton.jit
def _places(tile, BT: tl.constexpr, NP: tl.constexpr):
    """`(token, node)` of each row of a tile, and the rows' tokens counted within it."""
    r = tl.arange(0, BT * NP)
    return tile * BT + r // NP, r % NP, r // NP


@triton.jit
def _token_nodes(tile, T, BT: tl.constexpr, TP: tl.constexpr):
    """Token of each token node's row, and whether it exists."""
    s = tl.arange(0, TP)
    t = tile * BT + s
    return t, (s < BT) & (t < T)


@triton.jit
def _neighbors(mix, node, place, N, TRANSPOSED: tl.constexpr):
    """Block-diagonal `[R, R]`: what each node row takes from each other row of the same token."""
    same = (place[:, None] == place[None, :]) & (node[:, None] < N) & (node[None, :] < N)
    at = node[None, :] * N + node[:, None] if TRANSPOSED else node[:, None] * N + node[None, :]
    return tl.load(mix + at, mask=same, other=0.0)


@triton.jit
def _experts(c, to_rows, v, from_v, k, N, g, PP: tl.constexpr, PRECISE: tl.constexpr):
    """Layer 1 of the expert nodes before its activation, `[R, BK]`: two products, whose result needs no rearranging."""
    n = tl.arange(0, PP)
    own = tl.load(c + n[:, None] * g + k[None, :], mask=(n < N)[:, None] & (k < g)[None, :], other=0.0)
    acc = tl.zeros((to_rows.shape[0], k.shape[0]), tl.float32)
    return dot(from_v, limited(v, PRECISE), dot(to_rows, limited(own, PRECISE), acc, PRECISE), PRECISE)


@triton.jit
def _one_hot(place, scale, SIZE: tl.constexpr):
    """`[R, SIZE]`: row r has `scale[r]` in column `place[r]`."""
    return tl.where(place[:, None] == tl.arange(0, SIZE)[None, :], scale[:, None], 0.0)


@triton.jit
def _tokens(c, vq, alpha, t, live, k, g, SELF: tl.constexpr):
    """Both v and layer 1 of the token nodes before its activation, `[TP, BK]`."""
    live = live[:, None] & (k < g)[None, :]
    at = t.to(tl.int64)[:, None] * (2 * g if SELF else g) + k[None, :]
    v = tl.load(vq + at, mask=live, other=0.0)
    token = tl.load(c + k, mask=k < g, other=0.0)[None, :] + alpha * v
    if SELF:
        token += tl.load(vq + at + g, mask=live, other=0.0)
    return v, token


@triton.jit
def _matrix(w, row, column, g):
    """`w[row, column]` of a `[g, g]` matrix, 0 outside; the two index vectors are broadcast by the caller."""
    return tl.load(w + row * g + column, mask=(row < g) & (column < g), other=0.0)


@triton.jit
def _expert_rows(
    static, vq, conv, self_weight, features, tile, first, T, N, g,
    BT: tl.constexpr, NP: tl.constexpr, TP: tl.constexpr, G: tl.constexpr, BK: tl.constexpr, STAGES: tl.constexpr,
    ACT: tl.constexpr, SELF: tl.constexpr, RESIDUAL: tl.constexpr, PRECISE: tl.constexpr, KEEP: tl.constexpr,
):  # fmt: skip
    """Layer 2 before its activation, `[R, G]`; `KEEP` writes its inputs, `[H_1 summed over neighbors | H_1]`."""
    R: tl.constexpr = BT * NP
    PP: tl.constexpr = NP if NP > 16 else 16
    token, node, place = _places(tile, BT, NP)
    t, live = _token_nodes(tile, T, BT, TP)
    j = tl.arange(0, G)
    mix = static + (2 * N + 1) * g
    alpha = tl.load(mix + N * N + N + node, mask=node < N, other=0.0)
    token_alpha = tl.load(mix + N * N + N + N)
    taken = rounded(_neighbors(mix, node, place, N, False), PRECISE)
    link = tl.load(mix + N * N + node, mask=node < N, other=0.0)
    from_token = rounded(_one_hot(place, link, TP), PRECISE)
    from_v = rounded(_one_hot(place, alpha, TP), PRECISE)
    to_rows = rounded(_one_hot(node, tl.where(node < N, 1.0, 0.0), PP), PRECISE)
    width = 2 * g if SELF else g
    at, kept = _scratch_rows(token, first, node, T, N)
    acc = tl.zeros((R, G), tl.float32)
    for start in tl.range(0, G, BK, num_stages=STAGES):
        k = start + tl.arange(0, BK)
        v, own = _tokens(static + N * g, vq, token_alpha, t, live, k, g, SELF)
        experts = _experts(static, to_rows, v, from_v, k, N, g, PP, PRECISE)
        h = bounded(activation(experts, ACT, PRECISE), PRECISE)
        own = bounded(activation(own, ACT, PRECISE), PRECISE)
        spread = dot(from_token, own, tl.zeros((R, BK), tl.float32), PRECISE)
        spread = dot(taken, h, spread, PRECISE)
        w = rounded(_matrix(conv + g * g, j[None, :], k[:, None], g), PRECISE)
        acc = dot(rounded(spread, PRECISE), w, acc, PRECISE)
        if SELF:
            w = rounded(_matrix(self_weight + g * g, j[None, :], k[:, None], g), PRECISE)
            acc = dot(h, w, acc, PRECISE)
        if KEEP:
            inside = kept[:, None] & (k < g)[None, :]
            to = features + at[:, None] * width + k[None, :]
            tl.store(to, rounded_gradient(spread, PRECISE), mask=inside)
            if SELF:
                tl.store(to + g, rounded_gradient(h, PRECISE), mask=inside)
    if RESIDUAL:
        rows = static + (N + 1) * g + node[:, None] * g + j[None, :]
        acc += tl.load(rows, mask=(node < N)[:, None] & (j < g)[None, :], other=0.0)
    return acc


@triton.jit
def _scratch_rows(token, first, node, T, N):
    """Where each row is in scratch tensors that begin with token `first`, and whether it exists."""
    return (token - first) * N + node, (token < T) & (node < N)


@triton.jit
def nodes_forward_kernel(
    static, vq, conv, self_weight, out, offset, logits, probs, weights, index, T, N, g,
    BT: tl.constexpr, NP: tl.constexpr, TP: tl.constexpr, G: tl.constexpr, BK: tl.constexpr, STAGES: tl.constexpr,
    K: tl.constexpr, KP: tl.constexpr, ACT: tl.constexpr, SELF: tl.constexpr, RESIDUAL: tl.constexpr,
    OFFSET: tl.constexpr, NORMALIZE: tl.constexpr, PRECISE: tl.constexpr,
):  # fmt: skip
    """Logits, softmax, the K largest (ties to the lowest index) and their weights for BT tokens."""
    t = tl.program_id(0) * BT + tl.arange(0, BT)
    n = tl.arange(0, NP)
    j = tl.arange(0, G)
    acc = _expert_rows(
        static, vq, conv, self_weight, static, tl.program_id(0), 0, T, N, g,
        BT, NP, TP, G, BK, STAGES, ACT, SELF, RESIDUAL, PRECISE, False,
    )  # fmt: skip
    p = tl.load(out + j, mask=j < g, other=0.0).to(tl.float32)
    logit = tl.reshape(tl.sum(activation(acc, ACT, PRECISE) * p[None, :], axis=1), (BT, NP))
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
    probs, index, grad_logits, grad_probs, grad_weights, token, node, T, N,
    K: tl.constexpr, LOGITS: tl.constexpr, PROBS: tl.constexpr, WEIGHTS: tl.constexpr, NORMALIZE: tl.constexpr,
):  # fmt: skip
    """Gradient of each row's logit `[R]` from those of logits, probabilities and weights; each may be absent.

    Every row reads all of its token: a vector over rows takes any layout, a matrix over nodes would be rearranged
    after it was spread over the columns of what it is multiplied with.
    """
    at = token * N + node
    live = (token < T) & (node < N)
    prob = tl.load(probs + at, mask=live, other=0.0)
    grad = tl.zeros(prob.shape, tl.float32)
    mean = tl.zeros(prob.shape, tl.float32)
    if PROBS:
        grad += tl.load(grad_probs + at, mask=live, other=0.0)
        for m in range(N):
            other = tl.load(probs + token * N + m, mask=token < T, other=0.0)
            mean += other * tl.load(grad_probs + token * N + m, mask=token < T, other=0.0)
    if WEIGHTS:
        total = tl.zeros(prob.shape, tl.float32)
        pull = tl.zeros(prob.shape, tl.float32)
        own = tl.zeros(prob.shape, tl.float32)
        taken = tl.zeros(prob.shape, tl.float32)
        for i in tl.static_range(K):
            where = tl.load(index + token * K + i, mask=token < T, other=0).to(tl.int32)
            value = tl.load(grad_weights + token * K + i, mask=token < T, other=0.0)
            share = tl.load(probs + token * N + where, mask=token < T, other=0.0)
            total += share
            pull += share * value
            own = tl.where(where == node, value, own)
            taken = tl.where(where == node, 1.0, taken)
        if NORMALIZE:
            total = tl.where(total > 0, total, 1.0)
            grad += taken * (own - pull / total) / total
        else:
            grad += own
            mean += pull
    grad = prob * (grad - mean)
    if LOGITS:
        grad += tl.load(grad_logits + at, mask=live, other=0.0)
    return grad


@triton.jit
def nodes_backward_kernel(
    static, vq, conv, self_weight, out, probs, index, grad_logits, grad_probs, grad_weights,
    grad_rows, features, grad_vq, partial, edges, first, T, N, g, rows,
    BT: tl.constexpr, NP: tl.constexpr, TP: tl.constexpr, G: tl.constexpr, BK: tl.constexpr, STAGES: tl.constexpr,
    BO: tl.constexpr, OUT_STAGES: tl.constexpr, K: tl.constexpr,
    ACT: tl.constexpr, SELF: tl.constexpr, RESIDUAL: tl.constexpr, LOGITS: tl.constexpr, PROBS: tl.constexpr,
    WEIGHTS: tl.constexpr, NORMALIZE: tl.constexpr, EDGES: tl.constexpr, PRECISE: tl.constexpr,
):  # fmt: skip
    """Gradients of v and q, what the weight gradients of layer 2 are made of, and this tile's share of all others.

    Writes `grad_vq` `[T, g or 2 g]`; `grad_rows` `[T' N, g]`, the gradient of layer 2 before its activation, and its
    inputs, `features` `[T' N, g or 2 g]`, both of the T' tokens of this call, from token `first` to before token T.
    `partial` is `[tiles, rows, g]`: gradients of c (N + 1 rows), of p and of the residual's rows (N). `edges` is
    `[tiles, blocks of BO columns, N N + N + N + 1]`: gradients of mix, link and alpha.
    """
    tile = first // BT + tl.program_id(0)
    token, node, _ = _places(tile, BT, NP)
    n = tl.arange(0, NP)
    j = tl.arange(0, G)
    acc = _expert_rows(
        static, vq, conv, self_weight, features, tile, first, T, N, g,
        BT, NP, TP, G, BK, STAGES, ACT, SELF, RESIDUAL, PRECISE, True,
    )  # fmt: skip
    grad = _logit_gradient(
        probs, index, grad_logits, grad_probs, grad_weights, token, node, T, N,
        K, LOGITS, PROBS, WEIGHTS, NORMALIZE,
    )  # fmt: skip
    own = partial + tile.to(tl.int64) * rows * g
    nodes, slope = activation_and_slope(acc, ACT, PRECISE)
    tl.store(own + (N + 1) * g + j, tl.sum(grad[:, None] * nodes, axis=0), mask=j < g)
    p = tl.load(out + j, mask=j < g, other=0.0).to(tl.float32)
    # The logit's gradient is a factor of the whole row: it comes after products, so that float16 will do for the rest.
    slope = rounded(slope * p[None, :], PRECISE)
    d_rows = grad[:, None] * slope.to(tl.float32)
    if RESIDUAL:
        total = tl.sum(tl.reshape(d_rows, (BT, NP, G)), axis=0)
        inside = (n < N)[:, None] & (j < g)[None, :]
        tl.store(own + (N + 2) * g + n[:, None] * g + j[None, :], total, mask=inside)
    at, live = _scratch_rows(token, first, node, T, N)
    live = live[:, None] & (j < g)[None, :]
    tl.store(grad_rows + at[:, None] * g + j[None, :], rounded_gradient(d_rows, PRECISE), mask=live)
    _first_layer_gradients(
        slope, grad, static, vq, conv, self_weight, grad_vq, own, edges, tile, T, N, g,
        BT, NP, TP, G, BO, OUT_STAGES, ACT, SELF, EDGES, PRECISE,
    )  # fmt: skip


@triton.jit
def _first_layer_gradients(
    slope, grad, static, vq, conv, self_weight, grad_vq, own, edges, tile, T, N, g,
    BT: tl.constexpr, NP: tl.constexpr, TP: tl.constexpr, G: tl.constexpr, BO: tl.constexpr, STAGES: tl.constexpr,
    ACT: tl.constexpr, SELF: tl.constexpr, EDGES: tl.constexpr, PRECISE: tl.constexpr,
):  # fmt: skip
    """From `grad * slope`, the gradient `[R, G]` of layer 2 before its activation, back to c, alpha, v and q."""
    R: tl.constexpr = BT * NP
    PP: tl.constexpr = NP if NP > 16 else 16
    _, node, place = _places(tile, BT, NP)
    t, live = _token_nodes(tile, T, BT, TP)
    j = tl.arange(0, G)
    n = tl.arange(0, PP)
    mix = static + (2 * N + 1) * g
    alpha = tl.load(mix + N * N + N + node, mask=node < N, other=0.0)
    token_alpha = tl.load(mix + N * N + N + N)
    link = tl.load(mix + N * N + node, mask=node < N, other=0.0)
    given = rounded_gradient(_neighbors(mix, node, place, N, True), PRECISE)
    same_token = tl.arange(0, TP)[:, None] == place[None, :]
    to_token = rounded_gradient(tl.where(same_token, link[None, :], 0.0), PRECISE)
    from_v = rounded(_one_hot(place, alpha, TP), PRECISE)
    to_rows = rounded(_one_hot(node, tl.where(node < N, 1.0, 0.0), PP), PRECISE)
    to_v = rounded_gradient(tl.where(same_token, alpha[None, :], 0.0), PRECISE)
    to_c = rounded_gradient(tl.where(n[:, None] == node[None, :], 1.0, 0.0), PRECISE)
    width = 2 * g if SELF else g
    for start in tl.range(0, G, BO, num_stages=STAGES):
        k = start + tl.arange(0, BO)
        w = rounded(_matrix(conv + g * g, j[:, None], k[None, :], g), PRECISE)
        d_spread = grad[:, None] * dot(slope, w, tl.zeros((R, BO), tl.float32), PRECISE)
        d_h = tl.zeros((R, BO), tl.float32)
        if SELF:
            w = rounded(_matrix(self_weight + g * g, j[:, None], k[None, :], g), PRECISE)
            d_h = grad[:, None] * dot(slope, w, d_h, PRECISE)
        spread = rounded_gradient(d_spread, PRECISE)
        d_h = dot(given, spread, d_h, PRECISE)
        v, token_row = _tokens(static + N * g, vq, token_alpha, t, live, k, g, SELF)
        experts = _experts(static, to_rows, v, from_v, k, N, g, PP, PRECISE)
        h, h_slope = activation_and_slope(experts, ACT, PRECISE)
        d_experts = d_h * h_slope
        h_token, h_slope = activation_and_slope(token_row, ACT, PRECISE)
        d_token = dot(to_token, spread, tl.zeros((TP, BO), tl.float32), PRECISE) * h_slope
        d_experts16 = rounded_gradient(d_experts, PRECISE)
        d_v = dot(to_v, d_experts16, token_alpha * d_token, PRECISE)
        inside = live[:, None] & (k < g)[None, :]
        to = grad_vq + t.to(tl.int64)[:, None] * width + k[None, :]
        tl.store(to, rounded_gradient(d_v, PRECISE), mask=inside)
        if SELF:
            tl.store(to + g, rounded_gradient(d_token, PRECISE), mask=inside)
        d_c = dot(to_c, d_experts16, tl.zeros((PP, BO), tl.float32), PRECISE)
        tl.store(own + n[:, None] * g + k[None, :], d_c, mask=(n < N)[:, None] & (k < g)[None, :])
        tl.store(own + N * g + k, tl.sum(d_token, axis=0), mask=k < g)
        if EDGES:
            _edge_gradients(
                edges + (tile * (G // BO) + start // BO) * (N * N + 2 * N + 1), spread, h, d_experts16,
                h_token, d_token, v, N, BT, NP, TP, PRECISE,
            )  # fmt: skip


@triton.jit
def _edge_gradients(
    edges, spread, h, d_experts, h_token, d_token, v, N,
    BT: tl.constexpr, NP: tl.constexpr, TP: tl.constexpr, PRECISE: tl.constexpr,
):  # fmt: skip
    """This tile's and these columns' share of the gradients of mix, link and alpha."""
    R: tl.constexpr = BT * NP
    n = tl.arange(0, NP)
    h = rounded_gradient(h, PRECISE)
    d_mix = dot(spread, tl.trans(h), tl.zeros((R, R), tl.float32), PRECISE)
    r = tl.arange(0, R)
    d_mix = tl.where((r // NP)[:, None] == (r // NP)[None, :], d_mix, 0.0)
    d_mix = tl.sum(tl.sum(tl.reshape(d_mix, (BT, NP, BT, NP)), axis=2), axis=0)
    tl.store(edges + n[:, None] * N + n[None, :], d_mix, mask=(n < N)[:, None] & (n < N)[None, :])
    same = (r // NP)[None, :] == tl.arange(0, TP)[:, None]
    d_link = dot(rounded_gradient(h_token, PRECISE), tl.trans(spread), tl.zeros((TP, R), tl.float32), PRECISE)
    d_link = tl.sum(tl.where(same, d_link, 0.0), axis=0)
    tl.store(edges + N * N + n, tl.sum(tl.reshape(d_link, (BT, NP)), axis=0), mask=n < N)
    d_alpha = dot(rounded_gradient(v, PRECISE), tl.trans(d_experts), tl.zeros((TP, R), tl.float32), PRECISE)
    d_alpha = tl.sum(tl.where(same, d_alpha, 0.0), axis=0)
    tl.store(edges + N * N + N + n, tl.sum(tl.reshape(d_alpha, (BT, NP)), axis=0), mask=n < N)
    tl.store(edges + N * N + 2 * N, tl.sum(tl.sum(d_token * v, axis=1), axis=0))
