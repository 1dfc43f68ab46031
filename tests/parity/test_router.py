"""`preset="released"` routes as the authors' code does."""

import pytest
import torch
from torch.nn import functional as F

from graphlora.graph import adjacency_from_edges, normalized_adjacency, similarity_edges, twin_experts
from graphlora.load import batch_load
from graphlora.router import GraphRouter, select_experts

CASES = [
    *(f"router_{case}{kind}" for case in ("n8_t25", "n8_t10", "n4_t40", "n12_t30") for kind in ("", "_unit")),
    "router_n8_t25_twins",
]


@pytest.fixture(params=CASES)
def recorded(request, parity):
    return parity.read(f"{request.param}.safetensors")


@pytest.fixture
def router(recorded, parity):
    settings = recorded.settings
    config = parity.released_config(router_hidden_size=settings.router_hidden_size)
    return GraphRouter(
        settings.hidden_size,
        settings.num_experts,
        width=config.router_hidden_size,
        num_layers=settings.router_num_layers,
        act=F.silu,
        adjacency=None,
        conv=config.router_conv,
        expert_features=config.expert_features,
        self_term=config.router_self_term,
        self_term_weight=config.router_self_term_weight,
        input_gain=config.router_input_gain,
        input_norm=config.router_input_norm,
        edge_density=settings.density_threshold,
        learned_edges=False,
        centering=config.router_logit_centering,
        seed=0,
        spread=config.router_init_spread,
    )


def test_logits_and_gradients(recorded, router, parity, backend):
    named = parity.set_router(router, recorded, "weight.")
    x = recorded["input"].clone().requires_grad_()
    logits = router(x, backend)
    parity.within(logits, recorded["logits"], parity.tolerance.logits)
    parity.within(logits.softmax(-1), recorded["probs"], parity.tolerance.probs)
    (logits * recorded["grad_output"]).sum().backward()
    parity.gradient(x.grad, recorded["grad.input"])
    parity.router_gradients(router, named, recorded, "grad.")


def test_selection_weights_and_counts(recorded, router, parity, backend):
    parity.set_router(router, recorded, "weight.")
    top_k = recorded.settings.top_k
    routing = select_experts(router(recorded["input"], backend), top_k)
    if recorded.settings.twin_experts:
        assert recorded.settings.twin_experts == [list(pair) for pair in twin_experts(router.adjacency)]
        return
    assert torch.equal(routing.top_k_index, recorded["top_k_index"])
    parity.within(routing.top_k_weights, recorded["top_k_weights"], parity.tolerance.probs)
    probs = top_k * routing.router_probs.gather(1, routing.top_k_index)
    counts = batch_load(probs, routing.top_k_index, recorded.settings.num_experts, None)
    parity.within(counts, recorded["count_after"], parity.tolerance.counts)


def test_similarity_search_finds_the_recorded_graph(recorded, router, parity):
    parity.set_router(router, recorded, "weight.")
    edges = similarity_edges(router.expert_nodes(), recorded.settings.density_threshold)
    assert len(edges) == recorded.settings.expert_edges
    adjacency = adjacency_from_edges(recorded.settings.num_experts, edges)
    assert torch.equal(adjacency, recorded["adjacency"][:-1, :-1].fill_diagonal_(0))


def test_normalized_adjacency(recorded, parity):
    ours = normalized_adjacency(recorded["adjacency"][:-1, :-1])
    parity.within(ours, recorded["adjacency_normalized"], parity.tolerance.probs)
