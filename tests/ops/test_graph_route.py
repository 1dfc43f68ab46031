"""The closed form of the graph convolution agrees with equation 4 as printed, on logits and every gradient."""

import importlib

import pytest
import torch
from torch import Tensor
from torch.nn import functional as F

from graphlora import graph
from graphlora.ops.graph_route import GraphWeights, graph_logits_eager, graph_logits_torch

torch_path = importlib.import_module("graphlora.ops.graph_route.torch")
WIDTH = 6


@pytest.fixture(scope="module", autouse=True)
def _one_thread():
    torch.set_num_threads(1)


def make_leaves(
    tokens: int = 11,
    num_experts: int = 5,
    num_layers: int = 2,
    self_weight: bool = False,
    dtype: torch.dtype = torch.float32,
) -> dict[str, Tensor]:
    """Everything that wants a gradient; the adjacency is a full matrix of gates."""
    generator = torch.Generator().manual_seed(tokens + num_experts)

    def normal(*shape: int) -> Tensor:
        return (0.6 * torch.randn(shape, generator=generator)).to(dtype).requires_grad_()

    leaves = {
        "token": normal(tokens, WIDTH),
        "experts": normal(num_experts, WIDTH),
        "conv": normal(num_layers, WIDTH, WIDTH),
        "out": normal(WIDTH),
        "gates": torch.rand(num_experts * (num_experts - 1) // 2, generator=generator)
        .to(dtype)
        .requires_grad_(),
    }
    if self_weight:
        leaves["self_weight"] = normal(num_layers, WIDTH, WIDTH)
    return leaves


def make_weights(
    leaves: dict[str, Tensor], residual: float = 0.0, attention: Tensor | None = None
) -> GraphWeights:
    adjacency = graph.adjacency_from_gates(leaves["gates"], len(leaves["experts"]))
    return GraphWeights(
        experts=leaves["experts"],
        conv=leaves["conv"],
        self_weight=leaves.get("self_weight"),
        attention=attention,
        out=leaves["out"],
        adjacency=adjacency,
        normalized=graph.normalized_adjacency(adjacency),
        residual=residual,
    )


def results(path, leaves: dict[str, Tensor], residual: float, act=F.silu) -> dict[str, Tensor]:
    logits = path(leaves["token"], make_weights(leaves, residual), act)
    direction = torch.randn(logits.shape, generator=torch.Generator().manual_seed(2))
    grads = torch.autograd.grad(logits, list(leaves.values()), direction)
    return {"logits": logits.detach(), **dict(zip(leaves, grads, strict=True))}


def assert_paths_agree(leaves: dict[str, Tensor], residual: float, act=F.silu) -> None:
    found = results(graph_logits_torch, leaves, residual, act)
    for name, expected in results(graph_logits_eager, leaves, residual, act).items():
        torch.testing.assert_close(
            found[name], expected, rtol=1e-5, atol=1e-5, msg=lambda text, name=name: f"{name}: {text}"
        )


@pytest.mark.parametrize("num_layers", [1, 2, 3])
@pytest.mark.parametrize("residual", [0.0, 0.3])
@pytest.mark.parametrize("self_weight", [False, True])
@pytest.mark.parametrize("act", [F.silu, F.gelu, F.relu, torch.tanh])
def test_paths_agree(num_layers, residual, self_weight, act):
    assert_paths_agree(make_leaves(num_layers=num_layers, self_weight=self_weight), residual, act)


@pytest.mark.parametrize("tokens", [0, 1, 2, 30])
@pytest.mark.parametrize("num_experts", [1, 2, 9])
def test_paths_agree_on_odd_shapes(tokens, num_experts):
    assert_paths_agree(make_leaves(tokens=tokens, num_experts=num_experts), 0.5)


@pytest.mark.parametrize("tokens_per_chunk", [1, 4, 11])
def test_chunks_change_nothing(monkeypatch, tokens_per_chunk):
    leaves = make_leaves()
    whole = results(graph_logits_torch, leaves, 0.5)
    monkeypatch.setattr(torch_path, "_CHUNK_FLOATS", tokens_per_chunk * 6 * WIDTH)
    assert len(torch_path._chunks(leaves["token"], leaves["experts"])) == -(-11 // tokens_per_chunk)
    for name, value in results(graph_logits_torch, leaves, 0.5).items():
        torch.testing.assert_close(value, whole[name], rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("self_weight", [False, True])
def test_gradients_are_those_of_finite_differences(self_weight):
    leaves = make_leaves(tokens=3, num_experts=3, self_weight=self_weight, dtype=torch.float64)
    weights = make_weights(leaves, 0.3)
    fixed = {"normalized": weights.normalized.detach(), "adjacency": weights.adjacency.detach()}
    names = [name for name in leaves if name != "gates"]

    def run(normalized: Tensor, *values: Tensor) -> Tensor:
        moved = dict(zip(names, values, strict=True))
        token = moved.pop("token")
        return graph_logits_torch(token, weights._replace(**fixed | moved, normalized=normalized), F.silu)

    normalized = fixed.pop("normalized").double().requires_grad_()
    assert torch.autograd.gradcheck(run, (normalized, *(leaves[name] for name in names)))


def test_nothing_per_node_is_kept_for_backward():
    leaves = make_leaves(tokens=50)
    saved: list[int] = []

    def pack(t: Tensor) -> Tensor:
        saved.append(t.numel())
        return t

    weights = make_weights(leaves, 0.5)
    with torch.autograd.graph.saved_tensors_hooks(pack, lambda t: t):
        graph_logits_torch(leaves["token"], weights, F.silu)
    assert max(saved) == 50 * WIDTH


def test_gcn_is_the_printed_equation():
    """Two layers written out by hand on a path graph, one token."""
    leaves = make_leaves(tokens=1, num_experts=3)
    adjacency = graph.adjacency_from_edges(3, [(0, 1), (1, 2)])
    degree = torch.tensor([3.0, 4.0, 3.0, 4.0])
    full = torch.tensor([[1, 1, 0, 1], [1, 1, 1, 1], [0, 1, 1, 1], [1, 1, 1, 1.0]])
    normalized = full / (degree[:, None] * degree[None]).sqrt()
    torch.testing.assert_close(graph.normalized_adjacency(adjacency), normalized)
    nodes = torch.cat([leaves["experts"], leaves["token"]])
    for layer in leaves["conv"]:
        nodes = F.silu(normalized @ nodes @ layer.T)
    weights = make_weights(leaves)._replace(normalized=normalized)
    for path in (graph_logits_eager, graph_logits_torch):
        torch.testing.assert_close(path(leaves["token"], weights, F.silu)[0], nodes[:3] @ leaves["out"])


def test_sage_takes_the_mean_of_the_neighbors():
    leaves = make_leaves(tokens=2, num_experts=3, num_layers=1, self_weight=True)
    adjacency = graph.adjacency_from_edges(3, [(0, 1)])
    weights = make_weights(leaves)._replace(adjacency=adjacency)
    logits = graph_logits_eager(leaves["token"], weights, F.silu, "sage")
    experts, token = leaves["experts"], leaves["token"][1]
    mean = (experts[1] + token) / 2
    first = F.silu(leaves["conv"][0] @ mean + leaves["self_weight"][0] @ experts[0]) @ leaves["out"]
    alone = F.silu(leaves["conv"][0] @ token + leaves["self_weight"][0] @ experts[2]) @ leaves["out"]
    torch.testing.assert_close(logits[1, 0], first)
    torch.testing.assert_close(logits[1, 2], alone)


def test_gat_attends_within_the_closed_neighborhood():
    leaves = make_leaves(tokens=2, num_experts=3, num_layers=1)
    adjacency = graph.adjacency_from_edges(3, [(0, 1)])
    attention = torch.randn(1, 2, WIDTH, generator=torch.Generator().manual_seed(1))
    weights = make_weights(leaves, attention=attention)._replace(adjacency=adjacency)
    logits = graph_logits_eager(leaves["token"], weights, F.silu, "gat")
    members = (
        torch.stack([leaves["experts"][0], leaves["experts"][1], leaves["token"][1]]) @ leaves["conv"][0].T
    )
    scores = F.leaky_relu(members @ attention[0, 0] + members[0] @ attention[0, 1], 0.2)
    expected = F.silu(scores.softmax(0) @ members) @ leaves["out"]
    torch.testing.assert_close(logits[1, 0], expected)
