"""The fused kernels of the expert FFN against the expert loop: outputs and every gradient."""

import pytest
import torch
from torch import Tensor
from torch.nn import functional as F

pytest.importorskip("triton")
from graphlora.errors import GraphLoraError
from graphlora.ops.backend import interprets_triton
from graphlora.ops.dropout.reference import hashed_mask
from graphlora.ops.expert_ffn import ExpertWeights, FrozenFfn, LoraMasks, expert_ffn_eager, triton_launch
from graphlora.ops.expert_ffn.activations import DifferentiableAct
from graphlora.ops.expert_ffn.triton import expert_ffn_triton
from graphlora.ops.expert_ffn.triton_plan import PlanShape, make_plan

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
NAMES = ("x", "weights", *ExpertWeights._fields)
ACTIVATIONS = {
    "silu": F.silu,
    "gelu": F.gelu,
    "gelu_tanh": lambda x: F.gelu(x, approximate="tanh"),
}

pytestmark = [
    pytest.mark.usefixtures("poisoned_memory"),
    pytest.mark.skipif(
        DEVICE == "cpu" and not interprets_triton(), reason="neither a CUDA device nor the interpreter"
    ),
    # The interpreter computes in NumPy, where a sigmoid far from zero overflows on its way to 0.
    pytest.mark.filterwarnings("ignore:overflow encountered in exp:RuntimeWarning"),
]


class Case:
    """Random inputs of one block, and what a path makes of them."""

    def __init__(
        self, tokens, d, f, num_experts, top_k, r, act="silu", dtype=torch.float32, plain=True, ids=None
    ):
        generator = torch.Generator().manual_seed(tokens + f)

        def draw(*size: int, scale: float = 1.0) -> Tensor:
            return (torch.randn(*size, generator=generator) * scale).to(DEVICE)

        self.x = draw(tokens, d).to(dtype)
        self.frozen = [
            t.to(dtype) for t in (draw(f, d) * d**-0.5, draw(f, d) * d**-0.5, draw(d, f) * f**-0.5)
        ]
        n, a, b = num_experts, d**-0.5, 0.5
        self.experts = ExpertWeights(
            draw(n, r, d, scale=a), draw(n, f, r, scale=b), draw(n, r, d, scale=a), draw(n, f, r, scale=b),
            draw(n, r, f, scale=f**-0.5), draw(n, d, r, scale=b),
        )  # fmt: skip
        scores = torch.rand(tokens, n, generator=generator)
        index = scores.topk(top_k, dim=1).indices if ids is None else torch.tensor(ids).expand(tokens, -1)
        self.ids = index.contiguous().to(DEVICE)
        weights = torch.rand(tokens, top_k, generator=generator) + 0.1
        self.weights = (weights / weights.sum(dim=1, keepdim=True)).to(DEVICE)
        self.grad = draw(tokens, d).to(dtype)
        self.act, self.plain = DifferentiableAct(ACTIVATIONS[act]), plain

    def run(self, path, dtype=None, masks=None, **options) -> dict[str, Tensor]:
        """Output and gradients, by name; everything frozen in `dtype`, the experts in float32 or higher."""
        dtype = dtype or self.x.dtype
        gate, up, down = (t.to(dtype) for t in self.frozen)
        if self.plain == "joined":
            gate, up = torch.cat([gate, up]).chunk(2)
        ffn = FrozenFfn(
            lambda x: (x @ gate.T, x @ up.T),
            lambda m: m @ down.T,
            self.act,
            (lambda x: (gate, up)) if self.plain else None,
            (lambda m: down) if self.plain else None,
        )
        wide = torch.promote_types(dtype, torch.float32)
        leaves = [self.x.to(dtype), self.weights.to(wide), *(t.to(wide) for t in self.experts)]
        leaves = [t.detach().clone().requires_grad_() for t in leaves]
        experts = ExpertWeights(*leaves[2:])
        experts = experts.to(dtype) if path is expert_ffn_eager else experts
        given = (masks or LoraMasks(),) if path is expert_ffn_eager else ()
        out = path(leaves[0], ffn, experts, leaves[1], self.ids, 2.0, *given, **options)
        grads = torch.autograd.grad(out, leaves, self.grad.to(dtype))
        return {"output": out.detach(), **dict(zip(NAMES, grads, strict=True))}


def assert_close(found: dict[str, Tensor], expected: dict[str, Tensor], bound: float) -> None:
    for name, value in expected.items():
        error = float((found[name].double() - value.double()).norm() / value.double().norm().clamp_min(1e-30))
        assert error < bound, f"{name}: relative error {error:.2e}"


@pytest.mark.parametrize(
    ("tokens", "d", "f", "num_experts", "top_k", "r", "act", "plain"),
    [
        (70, 24, 64, 3, 2, 8, "silu", True),
        (33, 24, 37, 4, 2, 4, "gelu_tanh", False),
        (33, 16, 70, 4, 1, 3, "gelu", True),
        (70, 24, 64, 3, 2, 8, "silu", "joined"),
        (33, 24, 37, 4, 2, 4, "gelu_tanh", "joined"),
        (12, 16, 33, 8, 8, 2, "gelu", "joined"),
        (9, 16, 33, 20, 2, 33, "silu", "joined"),
        (12, 16, 40, 6, 3, 17, "silu", False),
        (12, 16, 33, 8, 8, 2, "silu", True),
        (2, 16, 33, 64, 8, 2, "silu", True),
        (9, 16, 33, 20, 2, 33, "gelu_tanh", False),
        (1, 16, 32, 8, 2, 8, "silu", True),
    ],
)
def test_equals_the_expert_loop(tokens, d, f, num_experts, top_k, r, act, plain):
    case = Case(tokens, d, f, num_experts, top_k, r, act, plain=plain)
    assert_close(case.run(expert_ffn_triton), case.run(expert_ffn_eager), 2e-6)


@pytest.mark.parametrize("plain", [True, "joined"])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_half_precision_is_as_exact_as_the_loop_in_it(dtype, plain):
    case = Case(20, 24, 64, 3, 2, 8, dtype=dtype, plain=plain)
    exact = case.run(expert_ffn_eager, dtype=torch.float64)
    assert_close(case.run(expert_ffn_triton), exact, 2e-2 if dtype == torch.bfloat16 else 3e-3)


@pytest.mark.parametrize("ids", [[0, 1], [5, 3]])
def test_all_tokens_on_the_same_experts(ids):
    """Experts without a token get zero gradients, not garbage."""
    case = Case(70, 16, 40, 8, 2, 4, ids=ids)
    found = case.run(expert_ffn_triton)
    assert_close(found, case.run(expert_ffn_eager), 2e-6)
    idle = [e for e in range(8) if e not in ids]
    assert float(found["gate_B"][idle].abs().max()) == 0.0


@pytest.mark.parametrize("plain", [True, "joined"])
def test_no_tokens(plain):
    case = Case(0, 16, 40, 8, 2, 4, plain=plain)
    found = case.run(expert_ffn_triton)
    assert found["output"].shape == (0, 16)
    assert all(float(t.abs().sum()) == 0.0 for t in found.values())


@pytest.mark.parametrize("num_experts", [3, 20])
def test_a_product_made_elsewhere(num_experts):
    """`A x` from outside: the same output, and the gradients of x and of both A come together there."""
    case = Case(20, 24, 64, num_experts, 2, 4)

    def beside(x: Tensor, ffn: FrozenFfn, experts: ExpertWeights, *others) -> Tensor:
        A = torch.cat([experts.gate_A.flatten(0, 1), experts.up_A.flatten(0, 1)])
        return expert_ffn_triton(x, ffn, experts, *others, low=x @ A.T)

    assert_close(case.run(beside), case.run(expert_ffn_eager), 2e-6)


def test_gradients_repeat_bit_for_bit():
    case = Case(20, 24, 64, 3, 2, 8)
    first, second = case.run(expert_ffn_triton), case.run(expert_ffn_triton)
    assert all(torch.equal(first[name], second[name]) for name in first)


@pytest.mark.parametrize(("num_experts", "top_k", "plain"), [(3, 2, True), (20, 3, False)])
def test_dropout_is_the_same_in_forward_and_backward(monkeypatch, num_experts, top_k, plain):
    """One mask of the input for gate and up, one of what lies between activation and down projection."""
    case = Case(6, 24, 70, num_experts, top_k, 4, plain=plain)
    monkeypatch.setattr(
        torch, "randint", lambda *_, **__: torch.tensor([1234], dtype=torch.int32, device=DEVICE)
    )
    of_input = hashed_mask(1234, 6, 24, 0.3, first_column=70).to(DEVICE)
    masks = LoraMasks(gate=of_input, up=of_input, down=hashed_mask(1234, 6, 70, 0.3).to(DEVICE))
    found = case.run(expert_ffn_triton, dropout=0.3)
    assert_close(found, case.run(expert_ffn_eager, masks=masks), 2e-6)


def test_recomputing_gate_and_up_changes_nothing():
    case = Case(20, 24, 64, 3, 2, 8)
    expected = case.run(expert_ffn_triton)
    found = case.run(expert_ffn_triton, recompute_gate_up=True)
    assert all(torch.equal(found[name], expected[name]) for name in expected)


def test_what_is_saved_for_backward():
    """x, g, u, the low-rank inputs, P, routing and small tables: no other tensor of the size tokens x f."""
    case = Case(32, 8, 64, 3, 2, 2)
    saved: dict[int, int] = {}

    def keep(t: Tensor) -> Tensor:
        saved[t.untyped_storage().data_ptr()] = t.untyped_storage().nbytes()
        return t

    with torch.autograd.graph.saved_tensors_hooks(keep, lambda t: t):
        case.run(expert_ffn_triton)
    wide = [size for size in saved.values() if size >= 32 * 64 * 4]
    assert len(wide) == 2


@pytest.mark.parametrize(
    ("rows", "num_experts", "top_k"),
    [(300, 8, 2), (65, 8, 3), (40, 16, 2), (130, 5, 1), (90, 32, 2), (50, 24, 6)],
)
def test_a_plan_covers_every_row_once_with_its_experts(rows, num_experts, top_k):
    generator = torch.Generator().manual_seed(rows)
    ids = torch.rand(rows, num_experts, generator=generator).topk(top_k, dim=1).indices.to(DEVICE)
    weights = torch.rand(rows, top_k, generator=generator).to(DEVICE)
    shape = PlanShape(rows, num_experts, top_k, tile=16, chunk=64)
    plan = make_plan(ids, weights, shape)
    order, sorted_weights, start, end, count, experts = (t.cpu() for t in shape.parts(plan))
    experts = experts.view(-1, num_experts)
    assert sorted(order.tolist()) == list(range(rows))
    for first, pieces in ((0, shape.tiles), (shape.tiles, shape.chunks)):
        seen = []
        for piece in range(first, first + pieces):
            rows_here = order[start[piece] : end[piece]].tolist() if start[piece] < end[piece] else []
            listed = experts[piece, : count[piece]].tolist()
            for row in rows_here:
                mine = sorted(ids[row].tolist())
                assert set(mine) <= set(listed)
                assert not shape.uniform or mine == listed
            seen += rows_here
        assert sorted(seen) == list(range(rows)) or pieces == 0
    starts = [part.data_ptr() - plan.data_ptr() for part in shape.parts(plan)]
    assert all(start % 16 == 0 for start in starts)
    assert shape.tiles * 4 % 16 == shape.chunks * 4 % 16 == 0
    if shape.uniform:
        by_expert = weights.cpu().gather(1, ids.cpu().argsort(dim=1))
        assert torch.equal(sorted_weights.view(torch.float32).view(rows, top_k), by_expert[order.long()])


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"act": DifferentiableAct(F.relu)}, "the activation relu"),
        ({"r": 65}, "r over 64"),
        ({"dtype": torch.float64}, "float64"),
    ],
)
def test_what_is_not_supported_is_said(change, message):
    case = Case(4, 8, 16, 8, 2, change.get("r", 2), dtype=change.get("dtype", torch.float32))
    case.act = change.get("act", case.act)
    with pytest.raises(GraphLoraError, match=message):
        case.run(expert_ffn_triton)


@pytest.mark.gpu
@pytest.mark.parametrize(
    ("tokens", "d", "f", "num_experts", "top_k", "r"),
    [
        (8192, 4096, 14336, 8, 2, 8),
        (1024, 3584, 18944, 8, 2, 16),
        (513, 576, 1536, 8, 2, 2),
        (2048, 2048, 5632, 64, 8, 64),
        (1000, 2049, 5633, 16, 2, 7),
    ],
)
def test_real_shapes(tokens, d, f, num_experts, top_k, r):
    """Against the loop in float32; bf16 rounding alone may differ."""
    case = Case(tokens, d, f, num_experts, top_k, r, dtype=torch.bfloat16)
    exact = case.run(expert_ffn_eager, dtype=torch.float32)
    assert_close(case.run(expert_ffn_triton), exact, 1.5e-2)


@pytest.mark.gpu
def test_a_cuda_graph_replays_forward_and_backward():
    case = Case(512, 256, 512, 8, 2, 8, dtype=torch.bfloat16)
    expected = case.run(expert_ffn_triton)
    side = torch.cuda.Stream()
    with torch.cuda.stream(side):
        case.run(expert_ffn_triton)
    torch.cuda.current_stream().wait_stream(side)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        found = case.run(expert_ffn_triton)
    for t in found.values():
        t.fill_(float("nan"))
    graph.replay()
    torch.cuda.synchronize()
    assert all(torch.equal(found[name], expected[name]) for name in expected)


def test_tile_plans_exist_for_every_size():
    for tokens in (1, 64, 1024, 8192, 131072):
        for dtype in (torch.float32, torch.bfloat16):
            plan = triton_launch.tile_plan(tokens, 14336, 64, dtype)
            assert plan.forward.tokens == plan.token_gradient.tokens
            assert plan.chunk >= 64
