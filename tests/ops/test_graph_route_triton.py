"""The fused graph router against equation 4 as printed and `select_experts`: the routing and every gradient."""

import pytest
import torch
from torch import Tensor
from torch.nn import functional as F

pytest.importorskip("triton")
from router_case import DEVICE, OUTPUTS, Case

from graphlora import graph
from graphlora.ops.backend import interprets_triton
from graphlora.ops.graph_route import triton_launch, triton_tiles
from graphlora.ops.graph_route.triton import (
    graph_route_beside,
    prepare_router,
    route_from_projection,
    supports,
)
from graphlora.router import GraphRouter

pytestmark = [
    pytest.mark.usefixtures("poisoned_memory"),
    pytest.mark.skipif(
        DEVICE == "cpu" and not interprets_triton(), reason="neither a CUDA device nor the interpreter"
    ),
    pytest.mark.filterwarnings("ignore:overflow encountered in exp:RuntimeWarning"),
    pytest.mark.filterwarnings("ignore:Deterministic behavior was enabled:UserWarning"),
]


def assert_agree(case: Case, bound: float, **options) -> None:
    found, expected = case.run(case.fused, **options), case.run(case.printed, **options)
    assert found["top_k_index"].dtype == torch.int64
    torch.testing.assert_close(found["top_k_index"], expected["top_k_index"])
    for name, value in expected.items():
        assert found[name].dtype == value.dtype and found[name].shape == value.shape, name
        error = (found[name].double() - value.double()).norm() / value.double().norm().clamp_min(1e-3)
        assert float(error) < bound, f"{name}: relative error {float(error):.2e}"


@pytest.mark.parametrize(
    "options",
    [
        {},
        {"self_weight": True},
        {"residual": 0.3, "act": "gelu"},
        {"self_weight": True, "residual": 0.5, "act": "gelu_tanh", "norm": False, "top_k": 3},
        {
            "eps": None,
            "offset": False,
            "act": "relu",
            "tokens": 37,
            "g": 33,
            "num_experts": 9,
            "self_weight": True,
        },
        {"gates": True, "self_weight": True, "residual": 0.3},
        {"gates": True, "g": 70, "num_experts": 33, "top_k": 8, "tokens": 3},
        {"num_experts": 1, "top_k": 1, "self_weight": True},
        {"num_experts": 2, "top_k": 2, "tokens": 1},
        {"num_experts": 64, "top_k": 2, "tokens": 2, "g": 16},
        {"tokens": 0},
        {"tokens": 0, "gates": True, "self_weight": True},
        {"d": 1500, "g": 130, "tokens": 5},
    ],
    ids=lambda options: " ".join(f"{k}={v}" for k, v in options.items()) or "plain",
)
def test_equals_the_printed_equation(options):
    assert_agree(Case(**options), 3e-6)


@pytest.mark.parametrize("used", [("router_logits",), ("router_probs",), ("top_k_weights",)])
def test_each_output_alone_gives_its_gradient(used):
    case = Case(self_weight=True)
    found, expected = case.run(case.fused, used=used), case.run(case.printed, used=used)
    for name, value in expected.items():
        torch.testing.assert_close(
            found[name], value, rtol=1e-4, atol=2e-5, msg=lambda text, name=name: name + text
        )


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("used", ["all", "no routing", "no product", "no tokens"])
def test_products_beside_the_router(used, dtype):
    """The tokens passed on, and their product with two more matrices: values, and what they add to the gradients."""
    case = Case(tokens=37, d=40, g=20, self_weight=True, dtype=dtype)
    leaves = case.leaves | {"gate_A": case.draw(3, 2, 40) * 0.2, "up_A": case.draw(3, 2, 40) * 0.2}
    to_x, to_low = case.draw(37, 40), case.draw(37, 12)

    def run(fused: bool) -> dict[str, Tensor]:
        own = {name: leaf.detach().clone().requires_grad_() for name, leaf in leaves.items()}
        matrices = own["gate_A"], own["up_A"]
        if fused:
            routing, (x, low) = graph_route_beside(own["x"], case.weights(own), 2, True, matrices)
            weights = routing[2]
        else:
            weights = case.printed(own).top_k_weights
            x, low = own["x"], own["x"].float() @ torch.cat([m.flatten(0, 1) for m in matrices]).T
        loss = x.new_zeros((), dtype=torch.float32)
        loss = loss + ((weights * case.directions[2]).sum() if used != "no routing" else 0)
        loss = loss + ((low * to_low).sum() if used != "no product" else 0)
        loss = loss + ((x * to_x).sum() if used != "no tokens" else 0)
        grads = torch.autograd.grad(loss, list(own.values()), allow_unused=True, materialize_grads=True)
        return {"low": low.detach(), **dict(zip(own, grads, strict=True))}

    found, expected = run(fused=True), run(fused=False)
    for name, value in expected.items():
        assert found[name].dtype == value.dtype and found[name].shape == value.shape, name
        error = (found[name].double() - value.double()).norm() / value.double().norm().clamp_min(1e-3)
        assert float(error) < (3e-6 if dtype == torch.float32 else 0.04), f"{name}: {float(error):.2e}"


def test_no_gradient_where_the_routing_is_not_used():
    case = Case()
    x = case.leaves["x"].clone().requires_grad_()
    routing = case.fused(case.leaves | {"x": x})
    grad = torch.autograd.grad(x.sum() + 0 * routing.router_probs.detach().sum(), x)[0]
    assert torch.equal(grad, torch.ones_like(x))


def test_a_frozen_router_gives_the_tokens_their_gradient():
    case = Case(self_weight=True, residual=0.3)
    x = case.leaves["x"].clone().requires_grad_()
    grads = [
        torch.autograd.grad((path(case.leaves | {"x": x}).router_logits * case.directions[0]).sum(), x)[0]
        for path in (case.fused, case.printed)
    ]
    torch.testing.assert_close(*grads, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize(
    "options", [{"self_weight": True}, {"residual": 0.5, "eps": None}, {"self_weight": True, "g": 100}]
)
def test_half_precision_stays_within_its_bound(dtype, options, monkeypatch):
    """README.md states the bound; the third router takes the tiles of many tokens."""
    monkeypatch.setattr(triton_tiles, "_MANY_ROWS", 1)
    case = Case(**{"tokens": 70, "d": 128, "g": 64, "num_experts": 8, "dtype": dtype} | options)
    found, exact = case.run(case.fused, used=OUTPUTS[:2]), case.run(case.printed, used=OUTPUTS[:2])
    error = (found["router_logits"] - exact["router_logits"]).square().mean().sqrt()
    spread = exact["router_logits"].std(dim=0).mean()
    assert 0 < float(error / spread) < 0.005
    for name, value in exact.items():
        if name.startswith("grad of"):
            assert found[name].dtype == value.dtype
            assert float((found[name] - value).float().norm() / value.float().norm()) < 0.01, name


def test_ties_go_to_the_lowest_index():
    case = Case(num_experts=6, top_k=3, offset=False)
    leaves = case.leaves | {"out": torch.zeros_like(case.leaves["out"])}
    assert case.fused(leaves).top_k_index.tolist() == [[0, 1, 2]] * 11


def test_twins_tie_in_every_token():
    """Experts with the same neighbors: their logits are equal bit for bit, in every tile."""
    case = Case(num_experts=4, top_k=1, offset=False, tokens=70)
    case.adjacency = graph.adjacency_from_edges(4, [(0, 1)]).to(DEVICE)
    features = case.leaves["features"]
    case.leaves["features"] = torch.cat([features[:2], features[2:3], features[2:3]])
    routing = case.fused(case.leaves)
    assert torch.equal(routing.router_logits[:, 0], routing.router_logits[:, 1])
    assert not (set(routing.top_k_index.flatten().tolist()) & {1})


@pytest.mark.filterwarnings("ignore:invalid value encountered:RuntimeWarning")
def test_not_a_number_selects_experts_that_exist():
    case = Case(num_experts=5)
    x = case.leaves["x"].clone()
    x[3] = torch.nan
    index = case.fused(case.leaves | {"x": x}).top_k_index
    assert int(index.min()) >= 0 and int(index.max()) < 5


def test_backward_in_pieces_changes_nothing(monkeypatch):
    case = Case(tokens=30, self_weight=True, gates=True)
    whole = case.run(case.fused)
    monkeypatch.setattr(triton_launch, "_SCRATCH_BYTES", 1)
    for name, value in case.run(case.fused).items():
        torch.testing.assert_close(value, whole[name], rtol=1e-5, atol=1e-6)


def test_gradients_repeat_bit_for_bit():
    case = Case(tokens=30, self_weight=True, gates=True)
    first, second = case.run(case.fused), case.run(case.fused)
    assert all(torch.equal(value, second[name]) for name, value in first.items())


def test_nothing_per_node_is_saved():
    case = Case(tokens=100, g=16, d=16, num_experts=16)
    leaves = {name: leaf.clone().requires_grad_() for name, leaf in case.leaves.items()}
    saved: list[int] = []
    with torch.autograd.graph.saved_tensors_hooks(lambda t: saved.append(t.numel()) or t, lambda t: t):
        case.fused(leaves)
    assert max(saved) == 100 * 16


@pytest.mark.parametrize("options", [{"self_weight": True}, {"residual": 0.3, "eps": None, "offset": False}])
def test_route_from_projection_is_the_second_half(options):
    case = Case(**options)
    weights, x = case.weights(case.leaves), case.leaves["x"]
    wide = x @ torch.cat([case.draw(3, 40), weights.token_proj]).T
    square_sum = None if case.eps is None else x.square().sum(dim=1)
    prepared = prepare_router(weights, x.dtype)
    routing = route_from_projection(wide[:, 3:], square_sum, prepared, case.top_k, case.norm)
    for found, expected in zip(routing, vars(case.fused(case.leaves)).values(), strict=True):
        torch.testing.assert_close(found, expected, rtol=1e-5, atol=1e-5)


def make_router(**changed) -> GraphRouter:
    torch.manual_seed(0)
    options = {
        "width": 16, "num_layers": 2, "act": F.silu, "adjacency": graph.adjacency_from_edges(6, [(0, 1), (2, 3)]),
        "conv": "gcn", "expert_features": "embedding", "self_term": "weight", "self_term_weight": 0.5,
        "input_gain": 1.0, "input_norm": True, "edge_density": 0.1, "learned_edges": False, "centering": True,
        "seed": 0, "spread": 2.0,
    }  # fmt: skip
    return GraphRouter(24, 6, **options | changed).to(DEVICE)


@pytest.mark.parametrize(
    ("changed", "is_fused"),
    [
        ({}, True),
        ({"learned_edges": True, "self_term": "residual"}, True),
        (
            {"expert_features": "projected", "self_term": "none", "centering": False, "input_norm": False},
            True,
        ),
        ({"conv": "sage"}, False),
        ({"conv": "gat"}, False),
        ({"num_layers": 3}, False),
        ({"act": torch.tanh}, False),
    ],
)
def test_the_router_takes_the_kernel_where_there_is_one(changed, is_fused):
    router = make_router(**changed)
    x = torch.randn(9, 24, generator=torch.Generator().manual_seed(1)).to(DEVICE)
    assert (router.fused_weights(2) is not None) == is_fused
    results = []
    for backend in ("triton", "torch"):
        routing = router.route(x, backend, 2)
        router.zero_grad()
        (routing.router_logits.sin().sum() + (routing.top_k_weights**2).sum()).backward()
        results.append((routing, {name: p.grad.clone() for name, p in router.named_parameters()}))
    (fused, fused_grads), (plain, plain_grads) = results
    for found, expected in zip(vars(fused).values(), vars(plain).values(), strict=True):
        torch.testing.assert_close(found, expected, rtol=1e-5, atol=1e-5)
    for name, grad in plain_grads.items():
        assert float((fused_grads[name] - grad).norm()) < 1e-5 * float(grad.norm()), name


def test_limits():
    assert supports("gcn", 2, "silu", 256, 64, 8)
    assert not supports("gcn", 2, "silu", 257, 8, 2)
    assert not supports("gcn", 2, "silu", 64, 65, 2)
    assert not supports("gcn", 2, "silu", 64, 64, 9)
    assert not supports("gcn", 2, None, 64, 8, 2)
