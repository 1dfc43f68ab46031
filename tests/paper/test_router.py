"""Equations 4 and 5: the graph router, the linear router and the selection of experts."""

from math import exp, sqrt

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch.nn import functional as F
from transformers import LlamaConfig, LlamaForCausalLM

from graphlora import GraphLoraConfig
from graphlora.graph import adjacency_from_edges, normalized_adjacency, random_edges
from graphlora.ops.graph_route import GraphWeights, graph_logits_eager, graph_logits_torch
from graphlora.router import GraphRouter, LinearRouter, select_experts
from graphlora.tuner.model import GraphLoraModel

D, N = 12, 4


def identity(x):
    return x


def make_router(preset="graphlora", edges=((0, 1), (1, 2)), num_experts=N, seed=0, **changes):
    config = GraphLoraConfig(preset=preset, num_experts=num_experts)
    values = {
        "width": 8,
        "num_layers": config.router_num_layers,
        "act": F.silu,
        "adjacency": adjacency_from_edges(num_experts, edges),
        "conv": config.router_conv,
        "expert_features": config.expert_features,
        "self_term": config.router_self_term,
        "self_term_weight": config.router_self_term_weight,
        "input_gain": config.router_input_gain,
        "input_norm": config.router_input_norm,
        "edge_density": config.edge_density,
        "learned_edges": False,
        "centering": config.router_logit_centering,
        "seed": 0,
        "spread": config.router_init_spread,
    }
    torch.manual_seed(seed)
    return GraphRouter(D, num_experts, **(values | changes))


def tokens(count=9, scale=1.0):
    return scale * torch.randn(count, D, generator=torch.Generator().manual_seed(7))


# --- selection ---------------------------------------------------------------------------------------------------


@given(
    st.lists(st.lists(st.integers(-3, 3), min_size=6, max_size=6), min_size=1, max_size=5), st.integers(1, 6)
)
def test_selection_takes_the_largest_in_order_and_the_lower_index_among_equals(rows, top_k):
    logits = torch.tensor(rows, dtype=torch.float32)
    routing = select_experts(logits, top_k)
    torch.testing.assert_close(routing.top_k_weights.sum(-1), torch.ones(len(rows)))
    torch.testing.assert_close(routing.router_probs.sum(-1), torch.ones(len(rows)))
    for row, index in zip(rows, routing.top_k_index.tolist(), strict=True):
        assert index == sorted(range(6), key=lambda i: (-row[i], i))[:top_k]


def test_selection_by_hand():
    logits = torch.tensor([[0.0, 2.0, 1.0]], dtype=torch.float64)
    routing = select_experts(logits, 2)
    assert routing.top_k_index.tolist() == [[1, 2]]
    torch.testing.assert_close(routing.top_k_weights, torch.tensor([[exp(1), 1.0]]) / (exp(1) + 1))
    plain = select_experts(logits, 2, norm_topk_prob=False)
    total = 1 + exp(1) + exp(2)
    torch.testing.assert_close(plain.top_k_weights, torch.tensor([[exp(2) / total, exp(1) / total]]))


# --- the graph convolution ---------------------------------------------------------------------------------------


def three_nodes(edges=(), **weights):
    """Two experts with features 1 and 2; the token has 3. All is one number wide, so it is worked out by hand."""
    adjacency = adjacency_from_edges(2, edges)
    one = torch.ones(1, 1, 1)
    values = {
        "experts": torch.tensor([[1.0], [2.0]]),
        "conv": one,
        "self_weight": None,
        "attention": None,
        "out": torch.ones(1),
        "adjacency": adjacency,
        "normalized": normalized_adjacency(adjacency),
        "residual": 0.0,
    }
    return torch.tensor([[3.0]]), GraphWeights(**(values | weights))


def logits_of(three, conv="gcn", act=identity):
    token, weights = three
    return graph_logits_eager(token, weights, act, conv)[0].tolist()


def test_gcn_layer_by_hand():
    assert logits_of(three_nodes([(0, 1)])) == pytest.approx([2.0, 2.0])  # (1 + 2 + 3) / 3
    a = 3 / sqrt(6)
    assert logits_of(three_nodes()) == pytest.approx([1 / 2 + a, 1 + a])


def test_two_gcn_layers_by_hand():
    """The activation follows every layer, the last one included; p and each W have their place."""
    act, a = torch.relu, 1 / sqrt(6)
    first = [max(0.0, v) for v in (-2 * (1 / 2 + 3 * a), -2 * (1 + 3 * a), -2 * (3 * a + 1))]
    assert first == [0.0, 0.0, 0.0]
    conv = torch.tensor([[[2.0]], [[-1.0]]])
    positive = [2 * (1 / 2 + 3 * a), 2 * (1 + 3 * a), 2 * (3 * a + 1)]
    expected = [-(positive[0] / 2 + a * positive[2]), -(positive[1] / 2 + a * positive[2])]
    three = three_nodes(conv=conv, out=torch.tensor([5.0]))
    assert logits_of(three) == pytest.approx([5 * v for v in expected])
    assert logits_of(three, act=act) == [0.0, 0.0]


def test_self_terms_by_hand():
    a = 3 / sqrt(6)
    residual = three_nodes(residual=0.25)
    assert logits_of(residual) == pytest.approx([0.75 * (0.5 + a) + 0.25, 0.75 * (1 + a) + 0.5])
    weight = three_nodes(self_weight=torch.full((1, 1, 1), 10.0))
    assert logits_of(weight) == pytest.approx([0.5 + a + 10, 1 + a + 20])


def test_sage_by_hand():
    """Mean over the neighbors times 2, plus the node itself."""
    weights = {"conv": torch.full((1, 1, 1), 2.0), "self_weight": torch.ones(1, 1, 1)}
    assert logits_of(three_nodes([(0, 1)], **weights), "sage") == pytest.approx([2 * 2.5 + 1, 2 * 2.0 + 2])
    assert logits_of(three_nodes(**weights), "sage") == pytest.approx([2 * 3 + 1, 2 * 3 + 2])


def test_gat_by_hand():
    uniform = {"attention": torch.zeros(1, 2, 1)}
    assert logits_of(three_nodes([(0, 1)], **uniform), "gat") == pytest.approx([2.0, 2.0])
    assert logits_of(three_nodes(**uniform), "gat") == pytest.approx([2.0, 2.5])
    source = {"attention": torch.tensor([[[1.0], [0.0]]])}
    weighted = (exp(1) + 2 * exp(2) + 3 * exp(3)) / (exp(1) + exp(2) + exp(3))
    assert logits_of(three_nodes([(0, 1)], **source), "gat") == pytest.approx([weighted] * 2)
    negative = {"attention": torch.tensor([[[1.0], [-10.0]]])}
    scores = [0.2 * (m - 10) for m in (1, 3)]  # leaky ReLU with slope 0.2
    weighted = (exp(scores[0]) + 3 * exp(scores[1])) / (exp(scores[0]) + exp(scores[1]))
    assert logits_of(three_nodes(**negative), "gat")[0] == pytest.approx(weighted)


@given(
    st.integers(1, 6),
    st.integers(1, 3),
    st.sampled_from([0.0, 0.3]),
    st.booleans(),
    st.integers(0, 5),
    st.integers(),
)
def test_closed_form_equals_the_convolution_as_printed(num_experts, num_layers, residual, own, count, seed):
    generator = torch.Generator().manual_seed(seed % 2**32)
    g = 5

    def random(*shape):
        return torch.randn(*shape, generator=generator, dtype=torch.float64).requires_grad_()

    token, experts, conv, out = random(count, g), random(num_experts, g), random(num_layers, g, g), random(g)
    self_weight = random(num_layers, g, g) if own else None
    adjacency = adjacency_from_edges(num_experts, random_edges(num_experts, 0.4, seed % 2**32))
    normalized = normalized_adjacency(adjacency).double().requires_grad_()
    weights = GraphWeights(experts, conv, self_weight, None, out, adjacency, normalized, residual)
    leaves = [t for t in (token, experts, conv, out, normalized, self_weight) if t is not None]
    grad = torch.randn(count, num_experts, generator=generator, dtype=torch.float64)
    printed = graph_logits_eager(token, weights, F.silu)
    closed = graph_logits_torch(token, weights, F.silu)
    torch.testing.assert_close(closed, printed, rtol=1e-6, atol=1e-6)
    ours, expected = (torch.autograd.grad(logits, leaves, grad) for logits in (closed, printed))
    torch.testing.assert_close(ours, expected, rtol=1e-6, atol=1e-6)


# --- the routers -------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("conv", ["gcn", "sage", "gat"])
@pytest.mark.parametrize("backend", ["eager", "torch"])
def test_learned_edges_get_a_gradient(conv, backend):
    router = make_router(conv=conv, learned_edges=True, edge_density=0.3)
    (router(tokens(), backend) * torch.arange(1.0, N + 1)).sum().backward()
    assert router.edge_logits.grad.isfinite().all()
    assert (router.edge_logits.grad != 0).all()


@pytest.mark.parametrize("conv", ["gcn", "sage", "gat"])
def test_permuting_the_experts_permutes_their_logits(conv):
    router, order = make_router(conv=conv), torch.tensor([2, 0, 3, 1])
    before = router(tokens())
    with torch.no_grad():
        router.expert_features.copy_(router.expert_features[order])
        router.adjacency.copy_(router.adjacency[order][:, order])
        router.logit_offset.copy_(router.logit_offset[order])
    torch.testing.assert_close(router(tokens()), before[:, order])


@pytest.mark.parametrize(("self_term", "apart"), [("none", False), ("residual", True), ("weight", True)])
@pytest.mark.parametrize("backend", ["eager", "torch"])
def test_twins_are_apart_only_with_a_self_term(self_term, apart, backend):
    router = make_router("paper", edges=[(0, 1)], self_term=self_term)
    logits = router(tokens(), backend)
    assert ((logits[:, 0] - logits[:, 1]).abs().min() > 1e-4) == apart
    assert (logits[:, 0] - logits[:, 2]).abs().min() > 1e-4


def test_default_router_does_not_see_the_scale_of_hidden_states():
    router = make_router()
    torch.testing.assert_close(router(tokens(scale=100.0)), router(tokens()), atol=1e-4, rtol=1e-4)
    released = make_router("released")
    assert not torch.allclose(released(tokens(scale=100.0)), released(tokens()), rtol=0.5)


def test_default_logits_start_centered_with_the_stated_spread():
    router = make_router(edges=random_edges(8, 0.1, 0), num_experts=8)
    logits = router(tokens(4000)).detach()
    assert logits.mean(dim=0).abs().max() < 0.3
    assert logits.std().item() == pytest.approx(GraphLoraConfig().router_init_spread, rel=0.15)


def test_linear_router():
    router = LinearRouter(D, N, input_norm=False, centering=False, seed=0, spread=1.5)
    assert router.weight.detach().abs().max() <= 1 / sqrt(D)
    torch.testing.assert_close(router(tokens()), tokens() @ router.weight.T)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_graph_and_means_stay_float32_when_the_router_is_cast(dtype):
    router = make_router(learned_edges=True).to(dtype)
    assert router.conv_weight.dtype == dtype
    kept = [getattr(router, name) for name in router.float32_names]
    assert all(tensor.dtype == torch.float32 for tensor in kept)
    assert router(tokens().to(dtype)).dtype == torch.float32


def graphs_of_layers(**changes):
    """Adjacency of each FFN block of a tiny Llama of three layers."""
    config = LlamaConfig(
        vocab_size=32, hidden_size=16, intermediate_size=24, num_hidden_layers=3, num_attention_heads=2,
        num_key_value_heads=2, max_position_embeddings=16, pad_token_id=0,
    )  # fmt: skip
    model = GraphLoraModel(
        LlamaForCausalLM(config), GraphLoraConfig(router_hidden_size=4, **changes), "default"
    )
    return [torch.tensor(block["adjacency"]) for block in model.routing_stats().values()]


def test_random_graph_of_a_block_depends_on_graph_seed_and_layer_alone():
    torch.manual_seed(1)
    first = graphs_of_layers(graph_seed=3)
    torch.manual_seed(2)
    second = graphs_of_layers(graph_seed=3)
    assert all(torch.equal(a, b) for a, b in zip(first, second, strict=True))
    assert not torch.equal(first[0], first[1]) and not torch.equal(first[1], first[2])
    assert not torch.equal(graphs_of_layers(graph_seed=4)[0], first[0])
    shared = graphs_of_layers(graph_seed=3, shared_graph=True)
    assert torch.equal(shared[0], shared[1]) and torch.equal(shared[1], shared[2])
