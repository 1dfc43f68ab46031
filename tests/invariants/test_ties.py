"""Ties at the top-k boundary go to the lowest index on every path and in every dtype."""

import pytest
import torch
from tiny_llama import make_base, make_batch, make_model

from graphlora.router import select_experts

DTYPES = [torch.float32, torch.bfloat16, torch.float16]


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("num_experts", [4, 8, 16, 64])
def test_exact_ties(dtype, num_experts):
    rows = torch.zeros(50, num_experts, dtype=dtype)
    assert select_experts(rows, 2).top_k_index.tolist() == [[0, 1]] * 50
    rows[:, num_experts // 2] = 1.0
    assert select_experts(rows, 3).top_k_index.tolist() == [[num_experts // 2, 0, 1]] * 50
    rows[:, 0] = -1.0
    assert select_experts(rows, 2).top_k_index.tolist() == [[num_experts // 2, 1]] * 50


def reference_selection(probs, top_k):
    return [sorted(range(len(row)), key=lambda e: (-row[e], e))[:top_k] for row in probs.tolist()]


@pytest.mark.parametrize("dtype", DTYPES)
def test_ties_from_rounding(dtype):
    generator = torch.Generator().manual_seed(0)
    logits = (torch.randn(500, 8, generator=generator) * 4).round().div(8).to(dtype)
    routing = select_experts(logits, 2)
    assert routing.top_k_index.tolist() == reference_selection(routing.router_probs, 2)
    ordered = routing.router_probs.sort(descending=True).values
    assert (ordered[:, 1] == ordered[:, 2]).float().mean() > 0.15, "the case must have ties at the boundary"


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("backend", ["eager", "torch"])
@pytest.mark.parametrize("granularity", ["ffn", "linear"])
@pytest.mark.filterwarnings("ignore:.*expert graphs hold twins")
def test_experts_of_equal_logits_in_a_model(dtype, backend, granularity):
    """A router whose weights are all zero gives every expert the same logit."""
    model = make_model(
        base=make_base().to(dtype),
        backend=backend,
        expert_granularity=granularity,
        router_logit_centering=False,
    )
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if "out_proj" in name:
                parameter.zero_()
    with model.base_model.record_routing() as record:
        model(**make_batch([6, 3]))
    for routing in record.values():
        assert routing.top_k_index.tolist() == [[0, 1]] * 12
        assert routing.top_k_weights.unique().tolist() == [0.5]


@pytest.mark.filterwarnings("ignore:.*expert graphs hold twins")
def test_twins_tie_in_bits_on_both_paths():
    """Experts that the graph cannot tell apart get equal bits on either path, so both choose the lowest index."""
    chosen = []
    for backend in ("eager", "torch"):
        model = make_model(preset="paper", edge_init="complete", num_experts=8, backend=backend)
        with model.base_model.record_routing() as record:
            model.eval()(**make_batch([9, 7]))
        first = record["model.layers.0.mlp"]
        assert (first.router_logits == first.router_logits[:, :1]).all()
        chosen.append(first.top_k_index)
    assert chosen[0].tolist() == chosen[1].tolist() == [[0, 1]] * 18
