"""A random graph router and random tokens, by the fused operation and by the equations as printed."""

import torch
from torch import Tensor
from torch.nn import functional as F

from graphlora import graph
from graphlora.ops.graph_route import GraphWeights, graph_logits_eager
from graphlora.ops.graph_route.triton import RouterWeights, graph_route_triton
from graphlora.router import Routing, rms_normalize, select_experts

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
ACTIVATIONS = {
    "silu": F.silu,
    "gelu": F.gelu,
    "gelu_tanh": lambda x: F.gelu(x, approximate="tanh"),
    "relu": F.relu,
}
OUTPUTS = ("router_logits", "router_probs", "top_k_weights", "top_k_index")


class Case:
    """A random router and random tokens."""

    def __init__(
        self, tokens=11, d=40, g=20, num_experts=5, top_k=2, act="silu", self_weight=False, residual=0.0, norm=True,
        eps=1e-6, gates=False, offset=True, dtype=torch.float32,
    ):  # fmt: skip
        self.generator = torch.Generator().manual_seed(tokens + num_experts)
        self.num_experts, self.top_k, self.act, self.norm, self.eps = num_experts, top_k, act, norm, eps
        self.residual = residual
        self.leaves = {
            "x": self.draw(tokens, d).to(dtype),
            "token_proj": self.draw(g, d, scale=d**-0.5),
            "features": self.draw(num_experts, g),
            "conv": self.draw(2, g, g, scale=1.5 * g**-0.5),
            "out": self.draw(g, scale=g**-0.5),
        }
        if self_weight:
            self.leaves["self_weight"] = self.draw(2, g, g, scale=g**-0.5)
        if gates:
            self.leaves["gates"] = self.draw(num_experts * (num_experts - 1) // 2)
        edges = graph.random_edges(num_experts, 0.4, 0)
        self.adjacency = graph.adjacency_from_edges(num_experts, edges).to(DEVICE)
        self.offset = self.draw(num_experts) if offset else None
        shapes = ((tokens, num_experts), (tokens, num_experts), (tokens, top_k))
        self.directions = [self.draw(*shape) for shape in shapes]

    def draw(self, *size: int, scale: float = 1.0) -> Tensor:
        return (torch.randn(*size, generator=self.generator) * scale).to(DEVICE)

    def fused(self, leaves: dict[str, Tensor]) -> Routing:
        return Routing(*graph_route_triton(leaves["x"], self.weights(leaves), self.top_k, self.norm))

    def weights(self, leaves: dict[str, Tensor]) -> RouterWeights:
        edges = self.adjacency
        if "gates" in leaves:
            edges = graph.normalized_adjacency(graph.adjacency_from_gates(leaves["gates"], self.num_experts))
        return RouterWeights(
            leaves["token_proj"], leaves["features"], leaves["conv"], leaves.get("self_weight"), leaves["out"], edges,
            self.offset, self.residual, self.act, self.eps,
        )  # fmt: skip

    def printed(self, leaves: dict[str, Tensor]) -> Routing:
        act = ACTIVATIONS[self.act]
        adjacency = self.adjacency
        if "gates" in leaves:
            adjacency = graph.adjacency_from_gates(leaves["gates"], self.num_experts)
        x = leaves["x"].float() if self.eps is None else rms_normalize(leaves["x"], self.eps)
        weights = GraphWeights(
            act(leaves["features"]), leaves["conv"], leaves.get("self_weight"), None, leaves["out"], adjacency,
            graph.normalized_adjacency(adjacency), self.residual,
        )  # fmt: skip
        logits = graph_logits_eager(act(x @ leaves["token_proj"].T), weights, act)
        return select_experts(logits if self.offset is None else logits - self.offset, self.top_k, self.norm)

    def run(self, path, used=OUTPUTS[:3]) -> dict[str, Tensor]:
        """Routing and gradients, by name; `used` are the outputs that a loss reads."""
        leaves = {name: leaf.detach().clone().requires_grad_() for name, leaf in self.leaves.items()}
        routing = path(leaves)
        pairs = zip(OUTPUTS, self.directions, strict=False)
        loss = sum((getattr(routing, name) * direction).sum() for name, direction in pairs if name in used)
        grads = torch.autograd.grad(loss, list(leaves.values()))
        outputs = {name: value.detach() for name, value in vars(routing).items()}
        return outputs | {f"grad of {name}": grad for name, grad in zip(leaves, grads, strict=True)}
