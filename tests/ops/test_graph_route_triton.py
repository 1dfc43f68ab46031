"""The fused graph router against equation 4 as printed and `select_experts`: the routing and every gradient."""

import pytest
import torch
from torch import Tensor
from torch.nn import functional as F

pytest.importorskip("triton")
from graphlora import graph
from graphlora.ops.backend import interprets_triton
from graphlora.ops.graph_route import GraphWeights, graph_logits_eager, triton_launch, triton_tiles
from graphlora.ops.graph_route.triton import (
    RouterWeights,
    graph_route_beside,
    graph_route_triton,
    prepare_router,
    route_from_projection,
    supports,
)
from graphlora.router import GraphRouter, Routing, rms_normalize, select_experts

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
ACTIVATIONS = {
    "silu": F.silu,
    "gelu": F.gelu,
    "gelu_tanh": lambda x: F.gelu(x, approximate="tanh"),
    "relu": F.relu,
}
OUTPUTS = ("router_logits", "router_probs", "top_k_weights", "top_k_index")
pytestmark = [
    pytest.mark.skipif(
        DEVICE == "cpu" and not interprets_triton(), reason="neither a CUDA device nor the interpreter"
    ),
    pytest.mark.filterwarnings("ignore:overflow encountered in exp:RuntimeWarning"),
    pytest.mark.filterwarnings("ignore:Deterministic behavior was enabled:UserWarning"),
]


@pytest.fixture(autouse=True)
def _poison(monkeypatch):
    """Every new buffer starts as NaN (or a large integer), so that what a kernel leaves unwritten shows."""
    torch.use_deterministic_algorithms(True, warn_only=True)
    monkeypatch.setattr(torch.utils.deterministic, "fill_uninitialized_memory", True)
    yield
    torch.use_deterministic_algorithms(False)


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


# --- on a GPU --------------------------------------------------------------------------------------------------------


def big_case(g: int, **options) -> Case:
    return Case(tokens=8192, d=4096, g=g, num_experts=8, dtype=torch.bfloat16, **options)


@pytest.mark.gpu
@pytest.mark.parametrize("g", [64, 256])
@pytest.mark.parametrize("options", [{"self_weight": True}, {}, {"residual": 0.5, "gates": True}])
def test_real_shapes(g, options):
    case = big_case(g, **options)
    found, exact = case.run(case.fused, used=OUTPUTS[:2]), case.run(case.printed, used=OUTPUTS[:2])
    spread = float(exact["router_logits"].std(dim=0).mean())
    error = float((found["router_logits"] - exact["router_logits"]).square().mean().sqrt())
    print(f"\ng={g} {options}: rms error of the logits / their spread {error / spread:.2e}")  # noqa: T201 - shown by -s
    assert error < 0.01 * spread
    for name, value in exact.items():
        if name.startswith("grad of"):
            error = float((found[name] - value).float().norm() / value.float().norm())
            print(f"  {name}: {error:.2e}")  # noqa: T201 - shown by -s
            assert error < 0.03, name
    again = case.run(case.fused, used=OUTPUTS[:2])
    assert all(torch.equal(value, again[name]) for name, value in found.items())


@pytest.mark.gpu
def test_a_cuda_graph_holds_forward_and_backward():
    case = big_case(64, self_weight=True)
    leaves = {name: leaf.detach().clone().requires_grad_() for name, leaf in case.leaves.items()}

    def step() -> tuple[Tensor, ...]:
        routing = case.fused(leaves)
        loss = (routing.router_probs * case.directions[1]).sum() + (
            routing.top_k_weights * case.directions[2]
        ).sum()
        return torch.autograd.grad(loss, list(leaves.values()))

    side = torch.cuda.Stream()
    try:
        torch.cuda.set_sync_debug_mode("error")
        with torch.cuda.stream(side):
            expected = [grad.clone() for grad in step()]
            step()
    finally:
        torch.cuda.set_sync_debug_mode("default")
    torch.cuda.synchronize()
    captured = torch.cuda.CUDAGraph()
    with torch.cuda.graph(captured):
        grads = step()
    captured.replay()
    torch.cuda.synchronize()
    assert all(torch.equal(a, b) for a, b in zip(grads, expected, strict=True))


@pytest.mark.gpu
@pytest.mark.parametrize("g", [64, 256])
@pytest.mark.parametrize("self_weight", [True, False])
def test_time_at_real_shapes(g, self_weight):
    """Prints the time of forward and backward, replayed, and every kernel's; the must is 0.5 ms, the goal 0.26."""
    torch.use_deterministic_algorithms(False)
    case = big_case(g, self_weight=self_weight)
    leaves = {name: leaf.detach().clone().requires_grad_() for name, leaf in case.leaves.items()}

    def step() -> None:
        routing = case.fused(leaves)
        torch.autograd.grad(
            [routing.router_probs, routing.top_k_weights], list(leaves.values()), case.directions[1:]
        )

    for _ in range(5):
        step()
    captured = torch.cuda.CUDAGraph()
    with torch.cuda.graph(captured):
        step()
    times = []
    for _ in range(50):
        start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        start.record()
        captured.replay()
        end.record()
        torch.cuda.synchronize()
        times.append(start.elapsed_time(end))
    median = sorted(times)[len(times) // 2]
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CUDA]) as profile:
        step()
        torch.cuda.synchronize()
    kernels = [event for event in profile.events() if event.device_type == torch.autograd.DeviceType.CUDA]
    print(f"\ng={g} self_weight={self_weight}: {median:.3f} ms, {len(kernels)} launches")  # noqa: T201 - shown by -s
    for event in kernels:
        print(f"  {event.device_time:7.1f} us  {event.name[:90]}")  # noqa: T201 - shown by -s
    assert median < 0.5
