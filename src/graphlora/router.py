"""The routers (paper eq. 4 and section 4.1): which experts adapt each token, and with what weight."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import TYPE_CHECKING, Any, cast

import torch
from torch import Tensor, nn

from graphlora import graph
from graphlora.ops.expert_ffn.activations import DifferentiableAct
from graphlora.ops.graph_route import GraphWeights, graph_logits_eager, graph_logits_torch
from graphlora.routing import (
    CenteredRouter,
    Float32State,
    RoutedTokens,
    Routing,
    begin_updates,
    collect_logits,
    select_experts,
)

if TYPE_CHECKING:
    from graphlora.ops.graph_route.triton import RouterWeights

__all__ = [
    "CenteredRouter", "Float32State", "GraphRouter", "LinearRouter", "Routing",
    "begin_updates", "build_adjacency", "collect_logits", "rms_normalize", "select_experts",
]  # fmt: skip

Activation = Callable[[Tensor], Tensor]
_RMS_EPS = 1e-6
# Standard deviation of a linear router's weights with `init="normal"`, as MixLoRA and most mixtures start.
_NORMAL_INIT = 0.02


def rms_normalize(x: Tensor, eps: float = _RMS_EPS) -> Tensor:
    """`x / rms(x)` over the last dimension, in float32."""
    x = x.float()
    return x * torch.rsqrt(x.square().mean(dim=-1, keepdim=True) + eps)


class LinearRouter(CenteredRouter):
    """`logits = W x` (+ b), the ablation without a graph and the router of the baselines.

    Args:
        hidden_size: d.
        num_experts: N.
        input_norm: RMS-normalize the token first.
        centering: see `CenteredRouter`.
        seed: seed of the calibration tokens.
        spread: standard deviation of the centered logits at initialization.
        bias: add a trained bias per expert, which starts at zero.
        init: `"kaiming"` (uniform, a = sqrt 5) or `"normal"` (standard deviation 0.02).
    """

    def __init__(
        self,
        hidden_size: int,
        num_experts: int,
        *,
        input_norm: bool,
        centering: bool,
        seed: int,
        spread: float,
        bias: bool = False,
        init: str = "kaiming",
    ) -> None:
        super().__init__(num_experts, centering)
        self.input_norm = input_norm
        self.weight = nn.Parameter(torch.empty(num_experts, hidden_size))
        if init == "normal":
            nn.init.normal_(self.weight, std=_NORMAL_INIT)
        else:
            nn.init.kaiming_uniform_(self.weight, a=math.sqrt(5))
        self.bias = nn.Parameter(torch.zeros(num_experts)) if bias else None
        self.calibrate(hidden_size, seed, spread)

    def raw_logits(self, x: Tensor, backend: str) -> Tensor:
        """See `CenteredRouter.raw_logits`."""
        del backend
        x = rms_normalize(x) if self.input_norm else x.float()
        logits = x @ self.weight.float().T
        return logits if self.bias is None else logits + self.bias.float()

    def _scale_output(self, scale: Tensor) -> None:
        self.weight.mul_(scale)


class GraphRouter(CenteredRouter):
    """A graph network over the N experts and the token scores the experts (paper eq. 4).

    Parameters are flat and stacked, so that an adapter file names them without nesting: `token_proj` (P_x, `[g, d]`),
    `expert_features` (`[N, g]` trained, or `[N, d]` frozen with `expert_proj`, P_e), `conv_weight` (`[L, g, g]`),
    `self_weight`, `attention`, `out_proj` (p, `[g]`), `edge_logits` (learned gates) and the buffer `adjacency`.

    Args:
        hidden_size: d.
        num_experts: N.
        width: g, the router's hidden size.
        num_layers: L.
        act: the model's FFN activation.
        adjacency: expert-expert block `[N, N]`, or None to build it from the similarity of the initial features.
        conv: `"gcn"`, `"sage"` or `"gat"`.
        expert_features: `"embedding"` or `"projected"`.
        self_term: `"none"`, `"residual"` or `"weight"`.
        self_term_weight: a of the residual form.
        input_gain: Glorot gain of P_x.
        input_norm: RMS-normalize the token first.
        edge_density: density of the similarity graph or of the learned gates.
        learned_edges: train a gate per expert pair, starting from `adjacency`.
        centering: see `CenteredRouter`.
        seed: seed of the calibration tokens.
        spread: standard deviation of the centered logits at initialization.
    """

    float32_names = (*CenteredRouter.float32_names, "adjacency", "edge_logits")
    adjacency: Tensor
    expert_features: Tensor

    def __init__(
        self,
        hidden_size: int,
        num_experts: int,
        *,
        width: int,
        num_layers: int,
        act: Activation,
        adjacency: Tensor | None,
        conv: str,
        expert_features: str,
        self_term: str,
        self_term_weight: float,
        input_gain: float,
        input_norm: bool,
        edge_density: float,
        learned_edges: bool,
        centering: bool,
        seed: int,
        spread: float,
    ) -> None:
        super().__init__(num_experts, centering)
        self.act, self.conv, self.input_norm = act, conv, input_norm
        self.act_name = (act if isinstance(act, DifferentiableAct) else DifferentiableAct(act)).name
        self.edge_density = edge_density
        self.residual = self_term_weight if self_term == "residual" and conv != "sage" else 0.0
        self.has_self_weight = conv == "sage" or self_term == "weight"
        self.projected = expert_features == "projected"
        self.token_proj = nn.Parameter(torch.empty(width, hidden_size))
        nn.init.xavier_uniform_(self.token_proj, gain=input_gain)
        if self.projected:
            features = torch.empty(num_experts, hidden_size)
            nn.init.xavier_uniform_(features)
            self.register_buffer("expert_features", features)
            self.expert_proj = nn.Parameter(torch.empty(width, hidden_size))
            nn.init.xavier_uniform_(self.expert_proj)
        else:
            self.expert_features = nn.Parameter(torch.randn(num_experts, width))
        self.conv_weight = _glorot(num_layers, width, width)
        self.self_weight = _glorot(num_layers, width, width) if self.has_self_weight else None
        self.attention = (
            nn.Parameter(torch.randn(num_layers, 2, width) / width**0.5) if conv == "gat" else None
        )
        self.out_proj = nn.Parameter(torch.empty(width))
        nn.init.uniform_(self.out_proj, -math.sqrt(6 / (width + 1)), math.sqrt(6 / (width + 1)))
        if adjacency is None:
            nodes = self.expert_nodes()
            edges = [] if nodes.is_meta else graph.similarity_edges(nodes, edge_density)
            adjacency = graph.adjacency_from_edges(num_experts, edges)
        self.register_buffer("adjacency", adjacency.to(self.out_proj.device))
        self.edge_logits = None
        if learned_edges:
            gates = graph.edge_gate_logits(adjacency.cpu(), edge_density) if not adjacency.is_meta else None
            pairs = num_experts * (num_experts - 1) // 2
            self.edge_logits = nn.Parameter(
                torch.empty(pairs) if gates is None else gates.to(self.out_proj.device)
            )
        self.calibrate(hidden_size, seed, spread)

    def _raw_expert_nodes(self) -> Tensor:
        features = self.expert_features.float()
        return features @ self.expert_proj.float().T if self.projected else features

    def expert_nodes(self) -> Tensor:
        """Expert node features E', `[num_experts, g]`, float32."""
        return self.act(self._raw_expert_nodes())

    def expert_adjacency(self) -> Tensor:
        """Adjacency in use, `[num_experts, num_experts]`: the stored graph, or the learned gates."""
        if self.edge_logits is None:
            return self.adjacency
        return graph.adjacency_from_gates(self.edge_logits, self.num_experts)

    def raw_logits(self, x: Tensor, backend: str) -> Tensor:
        """See `CenteredRouter.raw_logits`."""
        x = rms_normalize(x) if self.input_norm else x.float()
        token = self.act(x @ self.token_proj.float().T)
        adjacency = self.expert_adjacency()
        weights = GraphWeights(
            experts=self.expert_nodes(),
            conv=self.conv_weight.float(),
            self_weight=None if self.self_weight is None else self.self_weight.float(),
            attention=None if self.attention is None else self.attention.float(),
            out=self.out_proj.float(),
            adjacency=adjacency,
            normalized=graph.normalized_adjacency(adjacency),
            residual=self.residual,
        )
        if backend == "eager" or self.conv != "gcn":
            return graph_logits_eager(token, weights, self.act, self.conv)
        return graph_logits_torch(token, weights, self.act)

    def fused_routing(
        self, x: Tensor, top_k: int, norm_topk_prob: bool, matrices: tuple[Tensor, Tensor] | None
    ) -> RoutedTokens | None:
        """See `CenteredRouter.fused_routing`; None for another convolution, depth or activation, or a larger router."""
        from graphlora.ops.graph_route.triton import graph_route_beside

        weights = self.fused_weights(top_k)
        if weights is None:
            return None
        routing, beside = graph_route_beside(x, weights, top_k, norm_topk_prob, matrices)
        return RoutedTokens(Routing(*routing), *beside)

    def fused_weights(self, top_k: int) -> RouterWeights | None:
        """This router as `graphlora.ops.graph_route.triton` takes it; None where the kernels cannot run it."""
        from graphlora.ops.graph_route.triton import RouterWeights, supports

        num_layers, width, _ = self.conv_weight.shape
        if not supports(self.conv, num_layers, self.act_name, width, self.num_experts, top_k):
            return None
        # Fixed edges are normalized in the kernel.
        edges = (
            self.adjacency
            if self.edge_logits is None
            else graph.normalized_adjacency(self.expert_adjacency())
        )
        return RouterWeights(
            token_proj=self.token_proj,
            features=self._raw_expert_nodes(),
            conv=self.conv_weight,
            self_weight=self.self_weight,
            out=self.out_proj,
            graph=edges,
            logit_offset=self.logit_offset if self.centering else None,
            residual=self.residual,
            act=cast(str, self.act_name),
            eps=_RMS_EPS if self.input_norm else None,
        )

    def _scale_output(self, scale: Tensor) -> None:
        self.out_proj.mul_(scale)


def _glorot(*shape: int) -> nn.Parameter:
    weight = torch.empty(*shape)
    for matrix in weight:
        nn.init.xavier_uniform_(matrix)
    return nn.Parameter(weight)


def build_adjacency(num_experts: int, edge_init: Any, edge_density: float, seed: int) -> Tensor | None:
    """Initial expert-expert adjacency for a configured `edge_init`; None for `"similarity"`, which needs features.

    Args:
        num_experts: N.
        edge_init: `"random"`, `"ring"`, `"complete"`, `"none"`, `"learned"` (starts random), `"similarity"`, or a list
            of expert pairs.
        edge_density: share of joined pairs for the random graph.
        seed: seed of the random graph.
    """
    if edge_init == "similarity":
        return None
    if not isinstance(edge_init, str):
        return graph.adjacency_from_edges(num_experts, edge_init)
    edges = {
        "ring": lambda: graph.ring_edges(num_experts),
        "complete": lambda: graph.all_pairs(num_experts),
        "none": list,
    }.get(edge_init, lambda: graph.random_edges(num_experts, edge_density, seed))()
    return graph.adjacency_from_edges(num_experts, edges)
