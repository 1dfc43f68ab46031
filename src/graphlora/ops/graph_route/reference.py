"""Equation 4 as printed: all node features of all tokens, layer by layer, for every kind of convolution."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor
from torch.nn import functional as F

from graphlora.ops.graph_route.inputs import GraphWeights

Activation = Callable[[Tensor], Tensor]


def graph_logits_eager(token: Tensor, weights: GraphWeights, act: Activation, conv: str = "gcn") -> Tensor:
    """Router logits of every expert for every token.

    `H_0 = [E'; x']`, then `H_l = act(Â H_{l-1} W_l^T)` for the default convolution, `logit_e = p . H_L[e]`.

    Args:
        token: token features x', `[tokens, g]`, float32.
        weights: see `GraphWeights`.
        act: the activation.
        conv: `"gcn"`, `"sage"` or `"gat"`.

    Returns:
        `[tokens, N]`.
    """
    num_experts = weights.experts.shape[0]
    nodes = torch.cat([weights.experts.expand(len(token), -1, -1), token[:, None]], dim=1)
    first = nodes
    layer = {"gcn": _gcn, "sage": _sage, "gat": _gat}[conv]
    for i in range(weights.conv.shape[0]):
        nodes = act(layer(nodes, first, weights, i))
    return nodes[:, :num_experts] @ weights.out


def _gcn(nodes: Tensor, first: Tensor, weights: GraphWeights, i: int) -> Tensor:
    """`((1 - a) Â H + a H_0) W^T`, plus `H S^T` where the self term has a weight of its own."""
    spread = torch.einsum("nm,tmg->tng", weights.normalized, nodes)
    if weights.residual:
        spread = (1 - weights.residual) * spread + weights.residual * first
    spread = spread @ weights.conv[i].T
    return spread if weights.self_weight is None else spread + nodes @ weights.self_weight[i].T


def _sage(nodes: Tensor, first: Tensor, weights: GraphWeights, i: int) -> Tensor:
    """GraphSAGE with the mean aggregator: `mean over neighbors (H) W^T + H S^T`."""
    del first
    assert weights.self_weight is not None
    joined = F.pad(weights.adjacency.float(), (0, 1, 0, 1), value=1.0)
    joined = joined * (1 - torch.eye(len(joined), device=joined.device))
    mean = joined / joined.sum(dim=1, keepdim=True)
    return torch.einsum("nm,tmg->tng", mean, nodes) @ weights.conv[i].T + nodes @ weights.self_weight[i].T


def _gat(nodes: Tensor, first: Tensor, weights: GraphWeights, i: int) -> Tensor:
    """Graph attention, one head: softmax over each closed neighborhood of `leaky_relu(a_s . h_m + a_t . h_n)`.

    The self terms are those of `_gcn`.
    """
    assert weights.attention is not None
    projected = nodes @ weights.conv[i].T
    source, target = (projected @ weights.attention[i].T).unbind(dim=-1)
    score = F.leaky_relu(target[:, :, None] + source[:, None, :], 0.2)
    closed = F.pad(weights.adjacency.float(), (0, 1, 0, 1), value=1.0)
    closed = torch.maximum(closed, torch.eye(len(closed), device=closed.device))
    share = (score + closed.log()).softmax(dim=-1)
    spread = share @ projected
    if weights.residual:
        spread = (1 - weights.residual) * spread + weights.residual * (first @ weights.conv[i].T)
    return spread if weights.self_weight is None else spread + nodes @ weights.self_weight[i].T
