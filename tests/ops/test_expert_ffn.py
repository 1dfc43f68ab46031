"""The expert loop and the shared-base form agree on outputs and every gradient."""

import importlib
from dataclasses import dataclass
from functools import partial

import pytest
import torch
from torch import Tensor
from torch.nn import functional as F

from graphlora.moe import MoeSettings, moe_ffn
from graphlora.ops.expert_ffn import (
    ExpertWeights,
    FrozenFfn,
    LoraMasks,
    draw_masks,
    expert_ffn_eager,
    expert_ffn_torch,
)
from graphlora.ops.expert_ffn import pairs as pairs_by_expert
from graphlora.ops.expert_ffn.activations import DifferentiableAct
from graphlora.ops.expert_ffn.pairs import PairsByExpert, PairsBySlot
from graphlora.router import Routing, select_experts

torch_path = importlib.import_module("graphlora.ops.expert_ffn.torch")

ACTIVATIONS = {
    "silu": F.silu,
    "gelu": F.gelu,
    "gelu_tanh": partial(F.gelu, approximate="tanh"),
    "relu": F.relu,
    "tanh": torch.tanh,
    "squared_relu": lambda x: F.relu(x).square(),
}
D, WIDE = 12, 20


@pytest.fixture(scope="module", autouse=True)
def _one_thread():
    torch.set_num_threads(1)


@dataclass
class Problem:
    """An FFN block with experts and routing; every tensor in `leaves` wants a gradient."""

    leaves: dict[str, Tensor]
    top_k_index: Tensor
    act: DifferentiableAct
    gated: bool
    scaling: float = 1.7

    def ffn(self) -> FrozenFfn:
        def project_in(x: Tensor) -> tuple[Tensor | None, Tensor]:
            gate = x @ self.leaves["W_gate"].T if self.gated else None
            return gate, x @ self.leaves["W_up"].T + self.leaves["b_up"]

        def project_out(hidden: Tensor) -> Tensor:
            return hidden @ self.leaves["W_down"].T + self.leaves["b_down"]

        return FrozenFfn(project_in, project_out, self.act)

    def experts(self) -> ExpertWeights:
        return ExpertWeights(*(self.leaves.get(name) for name in ExpertWeights._fields))

    def weights(self) -> Tensor:
        scores = self.leaves["scores"].gather(1, self.top_k_index)
        return scores / scores.sum(dim=-1, keepdim=True)

    def results(self, path, masks: LoraMasks) -> dict[str, Tensor]:
        """The output, and the gradient of every leaf for a fixed random direction."""
        out = path(
            self.leaves["x"],
            self.ffn(),
            self.experts(),
            self.weights(),
            self.top_k_index,
            self.scaling,
            masks,
        )
        direction = torch.randn(out.shape, generator=torch.Generator().manual_seed(9)).to(out.dtype)
        grads = torch.autograd.grad(out, list(self.leaves.values()), direction)
        return {"output": out.detach(), **dict(zip(self.leaves, grads, strict=True))}


def make_problem(
    tokens: int = 17,
    num_experts: int = 5,
    top_k: int = 2,
    r: int = 3,
    act: str = "silu",
    gated: bool = True,
    dtype: torch.dtype = torch.float32,
    index: Tensor | None = None,
) -> Problem:
    generator = torch.Generator().manual_seed(tokens + 10 * num_experts + r)

    def normal(*shape: int) -> Tensor:
        return (0.5 * torch.randn(shape, generator=generator)).to(dtype).requires_grad_()

    leaves = {
        "x": normal(tokens, D),
        "W_up": normal(WIDE, D),
        "b_up": normal(WIDE),
        "W_down": normal(D, WIDE),
        "b_down": normal(D),
        "up_A": normal(num_experts, r, D),
        "up_B": normal(num_experts, WIDE, r),
        "down_A": normal(num_experts, r, WIDE),
        "down_B": normal(num_experts, D, r),
        "scores": (0.5 + torch.rand(tokens, num_experts, generator=generator)).to(dtype).requires_grad_(),
    }
    if gated:
        leaves |= {
            "W_gate": normal(WIDE, D),
            "gate_A": normal(num_experts, r, D),
            "gate_B": normal(num_experts, WIDE, r),
        }
    if index is None:
        index = leaves["scores"].detach().argsort(dim=-1, descending=True, stable=True)[:, :top_k]
    return Problem(leaves, index, DifferentiableAct(ACTIVATIONS[act]), gated)


def make_masks(problem: Problem, lora_dropout: float = 0.0, hidden_dropout: float = 0.0) -> LoraMasks:
    torch.manual_seed(4)
    return draw_masks(problem.leaves["x"].detach(), WIDE, problem.gated, lora_dropout, hidden_dropout)


def assert_same(one: dict[str, Tensor], other: dict[str, Tensor], tolerance: float = 1e-5) -> None:
    for name, expected in one.items():
        largest = float(expected.abs().max()) if expected.numel() else 0.0
        torch.testing.assert_close(
            other[name],
            expected,
            rtol=tolerance,
            atol=tolerance * (1 + largest),
            msg=lambda text, name=name: f"{name}: {text}",
        )


@pytest.fixture(params=["grouped", "slots"])
def parts(request, monkeypatch) -> str:
    """Both ways to walk over the experts; slots are what runs on devices other than the CPU."""
    if request.param == "slots":
        monkeypatch.setattr(
            torch_path, "order_pairs", lambda index, n, r, width, dtype: PairsBySlot(index, n, r, dtype)
        )
    return request.param


@pytest.mark.parametrize("gated", [True, False], ids=["gated", "plain"])
@pytest.mark.parametrize("act", ACTIVATIONS)
def test_paths_agree_for_every_activation(parts, gated, act):
    problem = make_problem(act=act, gated=gated)
    assert_same(
        problem.results(expert_ffn_eager, LoraMasks()), problem.results(expert_ffn_torch, LoraMasks())
    )


@pytest.mark.parametrize("gated", [True, False], ids=["gated", "plain"])
@pytest.mark.parametrize(("num_experts", "top_k"), [(1, 1), (2, 2), (4, 1), (7, 3), (8, 8)])
@pytest.mark.parametrize("r", [1, 5])
def test_paths_agree_for_every_shape(parts, gated, num_experts, top_k, r):
    problem = make_problem(num_experts=num_experts, top_k=top_k, r=r, gated=gated)
    assert_same(
        problem.results(expert_ffn_eager, LoraMasks()), problem.results(expert_ffn_torch, LoraMasks())
    )


@pytest.mark.parametrize("gated", [True, False], ids=["gated", "plain"])
@pytest.mark.parametrize(("lora", "hidden"), [(0.4, 0.0), (0.0, 0.4), (0.3, 0.3)])
def test_paths_agree_under_dropout(parts, gated, lora, hidden):
    problem = make_problem(gated=gated)
    masks = make_masks(problem, lora, hidden)
    without = problem.results(expert_ffn_eager, LoraMasks())
    results = problem.results(expert_ffn_eager, masks)
    assert not torch.allclose(results["output"], without["output"], atol=1e-3)
    assert_same(results, problem.results(expert_ffn_torch, masks))


@pytest.mark.parametrize("tokens", [0, 1, 2])
def test_paths_agree_for_few_tokens(parts, tokens):
    problem = make_problem(tokens=tokens)
    assert_same(
        problem.results(expert_ffn_eager, LoraMasks()), problem.results(expert_ffn_torch, LoraMasks())
    )


@pytest.mark.parametrize("index", [[[2]] * 9, [[4, 0]] * 9], ids=["one_expert", "two_experts"])
def test_paths_agree_where_experts_stay_empty(parts, index):
    problem = make_problem(tokens=9, index=torch.tensor(index))
    results = problem.results(expert_ffn_torch, LoraMasks())
    assert_same(problem.results(expert_ffn_eager, LoraMasks()), results)
    idle = [e for e in range(5) if e not in index[0]]
    for name in ("gate_A", "gate_B", "up_A", "up_B", "down_A", "down_B"):
        assert results[name][idle].abs().sum() == 0


@pytest.mark.parametrize("gated", [True, False], ids=["gated", "plain"])
@pytest.mark.parametrize("dropout", [0.0, 0.3])
def test_paths_agree_where_long_segments_are_cut(gated, dropout, monkeypatch):
    monkeypatch.setattr(pairs_by_expert, "_BUFFER_BYTES", 1)
    index = torch.tensor([[3, 1]] * 37 + [[0, 3]] * 21 + [[3, 4]])
    problem = make_problem(tokens=59, gated=gated, index=index)
    order = PairsByExpert(index, 5, 3, 4 * WIDE)
    sizes = [part.pairs.stop - part.pairs.start for part in order.parts()]
    assert sizes == [16, 5, 16, 16, 5, 16, 16, 16, 11, 1]
    masks = make_masks(problem, dropout, dropout)
    assert_same(problem.results(expert_ffn_eager, masks), problem.results(expert_ffn_torch, masks))


@pytest.mark.parametrize("gated", [True, False], ids=["gated", "plain"])
def test_by_slot_no_result_is_written_to_in_place(gated, monkeypatch):
    """PyTorch 2.11 compiles a function that does into one with wrong gradients (its issue 180642)."""
    monkeypatch.setattr(
        torch_path, "order_pairs", lambda index, n, r, _, dtype: PairsBySlot(index, n, r, dtype)
    )
    versions, inner = [], torch_path.ExpertMix.forward

    def forward(*arguments):
        results = inner(*arguments)
        versions.extend(result._version for result in results)
        return results

    monkeypatch.setattr(torch_path.ExpertMix, "forward", staticmethod(forward))
    problem = make_problem(gated=gated)
    problem.results(expert_ffn_torch, make_masks(problem, lora_dropout=0.3, hidden_dropout=0.2))
    assert versions == [0, 0]


@pytest.mark.parametrize("orders", [PairsByExpert, PairsBySlot])
def test_pairs_are_spread_and_collected(orders):
    """Collecting is the transpose of spreading; for the weights it is the inverse."""
    index = torch.tensor([[3, 1], [0, 3], [2, 0]])
    pairs = orders(index, 4, 2, WIDE) if orders is PairsByExpert else orders(index, 4, 2, torch.float32)
    weights = torch.rand(3, 2)
    assert torch.equal(pairs.collect_weights(pairs.spread_weights(weights)), weights)
    low = torch.randn(3, 8, requires_grad=True)
    spread = pairs.spread_low(low)
    direction = torch.randn_like(spread)
    torch.testing.assert_close(
        pairs.collect_low(direction), torch.autograd.grad(spread, low, direction)[0], rtol=0, atol=0
    )
    own = torch.nn.functional.one_hot(index, 4).sum(dim=1).repeat_interleave(2, dim=1)
    assert torch.equal(pairs.collect_low(spread.detach()), low.detach() * own)


@pytest.mark.parametrize("gated", [True, False], ids=["gated", "plain"])
def test_gradients_are_those_of_finite_differences(parts, gated):
    problem = make_problem(tokens=4, num_experts=3, r=2, gated=gated, dtype=torch.float64)
    masks = make_masks(problem, 0.3, 0.3)
    names = list(problem.leaves)

    def run(*values: Tensor) -> Tensor:
        moved = Problem(dict(zip(names, values, strict=True)), problem.top_k_index, problem.act, gated)
        return expert_ffn_torch(
            values[0], moved.ffn(), moved.experts(), moved.weights(), moved.top_k_index, 1.7, masks
        )

    assert torch.autograd.gradcheck(run, tuple(problem.leaves.values()), fast_mode=True)


def test_uninitialized_memory_is_never_read(parts):
    """In deterministic mode PyTorch fills new memory with NaN."""
    problem = make_problem()
    masks = make_masks(problem, 0.3, 0.3)
    expected = problem.results(expert_ffn_torch, masks)
    assert torch.utils.deterministic.fill_uninitialized_memory
    torch.use_deterministic_algorithms(True)
    try:
        assert torch.empty(3).isnan().all()
        poisoned = problem.results(expert_ffn_torch, masks)
    finally:
        torch.use_deterministic_algorithms(False)
    assert_same(expected, poisoned, tolerance=1e-6)


def test_memory_for_backward_does_not_grow_with_the_selected_experts():
    def wide_tensors(path, top_k: int) -> int:
        problem = make_problem(top_k=top_k)
        seen: dict[int, Tensor] = {}

        def pack(t: Tensor) -> Tensor:
            if t.shape == (17, WIDE):
                seen[t.data_ptr()] = t
            return t

        with torch.autograd.graph.saved_tensors_hooks(pack, lambda t: t):
            x, weights = problem.leaves["x"], problem.weights()
            path(x, problem.ffn(), problem.experts(), weights, problem.top_k_index, 1.7, LoraMasks())
        return len(seen)

    # gate, up, and the mix, which the frozen down projection keeps here because its weight wants a gradient.
    assert wide_tensors(expert_ffn_torch, 1) == wide_tensors(expert_ffn_torch, 4) == 3


@pytest.mark.parametrize("gated", [True, False], ids=["gated", "plain"])
def test_bfloat16_stays_near_float32(parts, gated):
    exact = make_problem(gated=gated)
    rough = make_problem(gated=gated, dtype=torch.bfloat16, index=exact.top_k_index)
    expected = exact.results(expert_ffn_eager, LoraMasks())
    for name, value in rough.results(expert_ffn_torch, LoraMasks()).items():
        assert value.dtype == torch.bfloat16
        error = (value.float() - expected[name]).norm() / expected[name].norm()
        assert error < 0.03, f"{name}: {error:.3f}"


@pytest.mark.parametrize("granularity", ["ffn", "linear"])
@pytest.mark.parametrize("gated", [True, False], ids=["gated", "plain"])
@pytest.mark.parametrize("lora_dropout", [0.0, 0.4])
def test_backends_agree_in_both_granularities(granularity, gated, lora_dropout):
    """The whole block, with the router's logits as a leaf and the dropout drawn inside."""
    problem = make_problem(gated=gated, top_k=3)
    leaves = {name: leaf for name, leaf in problem.leaves.items() if name != "scores"}
    logits = problem.leaves["scores"].detach().clone().requires_grad_()

    def results(backend: str) -> dict[str, Tensor]:
        torch.manual_seed(11)
        settings = MoeSettings(granularity, 1.7, lora_dropout, 0.2 if lora_dropout else 0.0, backend)
        routing = select_experts(logits, 3)
        out = moe_ffn(leaves["x"], problem.ffn(), problem.experts(), routing, settings)
        grads = torch.autograd.grad(out.square().sum(), [*leaves.values(), logits])
        return {"output": out.detach(), **dict(zip((*leaves, "logits"), grads, strict=True))}

    assert_same(results("eager"), results("torch"))


def test_granularities_differ():
    problem = make_problem()
    index = problem.top_k_index
    routing = Routing(problem.weights(), problem.weights(), problem.weights(), index)
    outs = [
        moe_ffn(
            problem.leaves["x"],
            problem.ffn(),
            problem.experts(),
            routing,
            MoeSettings(g, 1.7, 0.0, 0.0, "torch"),
        )
        for g in ("ffn", "linear")
    ]
    assert not torch.allclose(*outs, atol=1e-3)


def test_one_expert_is_plain_lora():
    """With one expert both granularities are LoRA on the three projections."""
    problem = make_problem(num_experts=1, top_k=1)
    leaves, s = problem.leaves, problem.scaling

    def adapted(x: Tensor, name: str) -> Tensor:
        return s * x @ leaves[f"{name}_A"][0].T @ leaves[f"{name}_B"][0].T

    x = leaves["x"]
    gate, up = problem.ffn().project_in(x)
    hidden = F.silu(gate + adapted(x, "gate")) * (up + adapted(x, "up"))
    expected = problem.ffn().project_out(hidden) + adapted(hidden, "down")
    routing = select_experts(torch.zeros(len(x), 1), 1)
    for granularity in ("ffn", "linear"):
        for backend in ("eager", "torch"):
            settings = MoeSettings(granularity, s, 0.0, 0.0, backend)
            out = moe_ffn(x, problem.ffn(), problem.experts(), routing, settings)
            torch.testing.assert_close(out, expected, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("act", ACTIVATIONS)
def test_activation_backward_is_autograds(act):
    wrapped = DifferentiableAct(ACTIVATIONS[act])
    x = torch.randn(50, generator=torch.Generator().manual_seed(0)).requires_grad_()
    grad = torch.linspace(-1, 1, 50)
    expected = torch.autograd.grad(ACTIVATIONS[act](x), x, grad)[0]
    torch.testing.assert_close(wrapped.backward(grad, x.detach()), expected, rtol=1e-6, atol=1e-6)


def test_dropout_masks_keep_the_mean_and_the_extremes():
    x = torch.zeros(400, 30)
    torch.manual_seed(0)
    masks = draw_masks(x, 50, gated=True, lora_dropout=0.25, hidden_dropout=0.0)
    assert masks.gate is not None
    assert masks.hidden is None
    torch.testing.assert_close(masks.gate.unique(), torch.tensor([0.0, 4 / 3]))
    assert masks.down is not None
    assert masks.down.shape == (400, 50)
    assert float(masks.down.mean()) == pytest.approx(1.0, abs=0.02)
    everything = draw_masks(x, 50, gated=False, lora_dropout=0.0, hidden_dropout=1.0)
    assert everything.hidden is not None
    assert everything.hidden.abs().sum() == 0
