"""The decode kernels against their references, and the whole path against the expert loop."""

import pytest
import torch
from torch import Tensor
from torch.nn import functional as F

pytest.importorskip("triton")
from graphlora.ops import decode
from graphlora.ops.backend import interprets_triton
from graphlora.ops.decode import reference, triton_single
from graphlora.ops.expert_ffn import ExpertWeights, FrozenFfn, LoraMasks, expert_ffn_eager
from graphlora.ops.expert_ffn.activations import DifferentiableAct

ON_GPU = torch.cuda.is_available()
DEVICE = "cuda" if ON_GPU else "cpu"
# Triton's interpreter cuts float32 to bfloat16 instead of rounding it.
TOLERANCE = {torch.float32: 2e-5, torch.bfloat16: 2e-2, torch.float16: 4e-3}
ACTIVATIONS = {
    "silu": F.silu,
    "gelu": F.gelu,
    "gelu_tanh": lambda x: F.gelu(x, approximate="tanh"),
    "relu": F.relu,
}
dtypes = pytest.mark.parametrize(
    "dtype", list(TOLERANCE), ids=lambda dtype: str(dtype).removeprefix("torch.")
)

pytestmark = [
    pytest.mark.usefixtures("poisoned_memory"),
    pytest.mark.skipif(
        not ON_GPU and not interprets_triton(), reason="no CUDA device, and TRITON_INTERPRET is not set"
    ),
]


def normal(*shape: int, dtype: torch.dtype = torch.float32, seed: int = 0) -> Tensor:
    generator = torch.Generator().manual_seed(seed + sum(shape))
    return torch.randn(shape, generator=generator).to(dtype).to(DEVICE)


def near(value: Tensor, expected: Tensor, tolerance: float) -> None:
    assert value.shape == expected.shape
    assert value.dtype == expected.dtype
    scale = float(expected.float().abs().max())
    assert scale > 0
    torch.testing.assert_close(value.float(), expected.float(), rtol=tolerance, atol=tolerance * scale)


def choose(tokens: int, num_experts: int, top_k: int) -> tuple[Tensor, Tensor]:
    probs = normal(tokens, num_experts, seed=5).softmax(dim=1)
    weights, index = probs.topk(top_k, dim=1)
    return weights / weights.sum(dim=1, keepdim=True), index


@pytest.fixture(autouse=True)
def _kernels_for_one_token(monkeypatch):
    """Several tokens take the other kernels, which is tested with few of them here."""
    monkeypatch.setattr(triton_single, "TOKENS", 1)
    monkeypatch.setattr(triton_single, "PROJECT_TOKENS", 1)


@dtypes
@pytest.mark.parametrize(
    ("tokens", "d", "rows"), [(1, 16, (2, 2, 5)), (3, 131, (17, 16, 64)), (64, 140, (8, 8, 0))]
)
def test_project(dtype, tokens, d, rows):
    x = normal(tokens, d, dtype=dtype)
    weights = [normal(row, d, seed=i) for i, row in enumerate(rows)]
    expected = reference.project(x, *weights)
    for value, right in zip(decode.project(x, *weights), expected, strict=True):
        near(value, right, 1e-4)


@dtypes
@pytest.mark.parametrize(
    ("tokens", "d", "pairs"),
    [
        (1, 24, [(33, 1)]),
        (1, 1030, [(140, 8), (33, 8), (70, 8)]),
        (3, 1030, [(40, 8)]),
        (3, 520, [(40, 5), (17, 5)]),
        (64, 512, [(31, 17), (70, 17), (33, 17)]),
        # Ranks that differ: one launch each.
        (1, 40, [(33, 2), (20, 5), (20, 2)]),
        (5, 40, [(33, 2), (20, 5), (20, 2)]),
    ],
)
def test_attention_lora(dtype, tokens, d, pairs):
    """Widths and ranks of one to three projections that read one tensor."""
    x = normal(tokens, d, dtype=dtype)
    bases = [normal(tokens, width, dtype=dtype, seed=i) for i, (width, _) in enumerate(pairs)]
    As = [normal(r, d, seed=i) / d**0.5 for i, (_, r) in enumerate(pairs)]
    Bs = [normal(width, r, seed=i) for i, (width, r) in enumerate(pairs)]
    low = decode.low_rank(x, As)
    near(low, reference.low_rank(x, As), TOLERANCE[dtype])
    before = [base.clone() for base in bases]
    found = decode.add_low_rank(low, bases, Bs, 1.7)
    rights = reference.add_low_rank(low, bases, Bs, 1.7)
    for out, right, base, A, B in zip(found, rights, bases, As, Bs, strict=True):
        near(out, right, TOLERANCE[dtype])
        exact = x.double() @ A.double().T @ B.double().T * 1.7 + base.double()
        near(out, exact.to(dtype), TOLERANCE[dtype])
    assert all(torch.equal(base, same) for base, same in zip(bases, before, strict=True))


@pytest.mark.parametrize("tokens", [1, 3])
def test_pairs_of_other_dtypes_are_computed_together(tokens):
    x, base = normal(tokens, 24), normal(tokens, 10)
    As, Bs = [normal(2, 24), normal(2, 24, seed=1).bfloat16()], [normal(10, 2).half(), normal(10, 2, seed=1)]
    low = decode.low_rank(x, As)
    near(low, reference.low_rank(x, As), 2e-5)
    found = decode.add_low_rank(low, [base, base], Bs, 0.5)
    for out, right in zip(found, reference.add_low_rank(low, [base, base], Bs, 0.5), strict=True):
        near(out, right, 2e-5)


SHAPES = [
    (1, 8, 2, 8),
    (1, 9, 3, 5),
    (1, 12, 8, 8),
    (1, 12, 8, 16),
    (12, 8, 2, 8),
    (24, 8, 2, 8),
    (3, 5, 3, 3),
    (64, 8, 2, 8),
    (64, 9, 8, 7),
    (17, 64, 1, 2),
    (5, 1, 1, 16),
    (33, 12, 5, 16),
]


@dtypes
@pytest.mark.parametrize(("tokens", "num_experts", "top_k", "r"), SHAPES)
def test_mix_and_combine(dtype, tokens, num_experts, top_k, r):
    d, f = 45, 70
    act = list(ACTIVATIONS)[tokens % 4]
    weights, index = choose(tokens, num_experts, top_k)
    gate, up = normal(tokens, f, dtype=dtype), normal(tokens, f, dtype=dtype, seed=1)
    low = normal(tokens, 2 * num_experts * r + 6) / r
    args = (
        gate, up, low, normal(num_experts, f, r), normal(num_experts, f, r, seed=2),
        normal(num_experts, r, f) / f**0.5, weights, index, 0.6, act,
    )  # fmt: skip
    mixed, partial = decode.mix(*args)
    right_mixed, right_partial = reference.mix(*args)
    near(mixed, right_mixed, TOLERANCE[dtype])
    near(partial, right_partial, TOLERANCE[dtype])
    base, down_B, low = normal(tokens, d, dtype=dtype), normal(num_experts, d, r), partial.sum(dim=0)
    near(
        decode.combine(base, low, index, down_B, 0.6),
        reference.combine(base, low, index, down_B, 0.6),
        TOLERANCE[dtype],
    )
    again = decode.mix(*args)
    assert torch.equal(again[0], mixed)
    assert torch.equal(again[1], partial)


@dtypes
@pytest.mark.parametrize("act", ACTIVATIONS)
@pytest.mark.parametrize(("tokens", "num_experts", "top_k", "r"), [(1, 4, 2, 3), (19, 6, 3, 4)])
def test_the_path_is_the_expert_loop(dtype, act, tokens, num_experts, top_k, r):
    d, f, scaling = 37, 67, 1.3
    x = normal(tokens, d, dtype=dtype)
    W_gate, W_up, W_down = (normal(*s) / s[1] ** 0.5 for s in ((f, d), (f, d), (d, f)))
    sizes = [(num_experts, r, d), (num_experts, f, r)] * 2 + [(num_experts, r, f), (num_experts, d, r)]
    experts = ExpertWeights(*(normal(*s, seed=i) / s[2] ** 0.5 for i, s in enumerate(sizes)))
    weights, index = choose(tokens, num_experts, top_k)
    wide = FrozenFfn(
        lambda x: (x @ W_gate.to(dtype).float().T, x @ W_up.to(dtype).float().T),
        lambda h: h @ W_down.to(dtype).float().T,
        DifferentiableAct(ACTIVATIONS[act]),
    )
    expected = expert_ffn_eager(x.float(), wide, experts, weights, index, scaling, LoraMasks())
    gate, up = (part.to(dtype) for part in wide.project_in(x.float()))
    low, _ = decode.project(x, experts.gate_A.flatten(0, 1), experts.up_A.flatten(0, 1), x.new_empty(0, d))
    mixed, partial = decode.mix(
        gate, up, low, experts.gate_B, experts.up_B, experts.down_A, weights, index, scaling, act
    )
    out = wide.project_out(mixed.float()).to(dtype)
    out = decode.combine(out, partial.sum(dim=0), index, experts.down_B, scaling)
    error = (out.float() - expected).norm() / expected.norm()
    assert error < {torch.float32: 1e-5, torch.bfloat16: 3e-2, torch.float16: 2e-3}[dtype]


@dtypes
def test_a_few_tokens_take_the_kernels_for_one(monkeypatch, dtype):
    monkeypatch.setattr(triton_single, "TOKENS", 16)
    test_attention_lora(dtype, 3, 1030, [(140, 8), (33, 8), (70, 8)])
    test_mix_and_combine(dtype, 12, 8, 2, 8)
    test_mix_and_combine(dtype, 5, 9, 3, 5)
    monkeypatch.setattr(triton_single, "PROJECT_TOKENS", 32)
    test_project(dtype, 9, 140, (8, 8, 6))


def test_which_tokens_take_the_kernels_for_one(monkeypatch):
    monkeypatch.undo()
    takes = triton_single.takes
    assert takes(1, 32, 2) and not takes(1, 33, 2) and takes(1, 64) and not takes(1, 65)
    assert takes(16, 8, 2) and not takes(17, 8, 2) and not takes(16, 9, 2) and takes(8, 16, 2) and takes(16)


def test_a_token_alone_gives_what_it_gives_beside_others(monkeypatch):
    tokens, d, f, num_experts, top_k, r = 3, 530, 70, 6, 3, 5
    x, base = normal(tokens, d), normal(tokens, d, seed=1)
    gate, up = normal(tokens, f), normal(tokens, f, seed=1)
    rows = [normal(n, d, seed=n) for n in (3, 8, 1)]
    As, Bs = [normal(r, d), normal(r, d, seed=1)], [normal(d, r), normal(d, r, seed=1)]
    weights, index = choose(tokens, num_experts, top_k)
    low, low_down = normal(tokens, 2 * num_experts * r + 6), normal(tokens, top_k, r)
    stacks = (normal(num_experts, f, r), normal(num_experts, f, r, seed=2), normal(num_experts, r, f))
    down_B = normal(num_experts, d, r)

    def run(at: slice) -> list[tuple[Tensor, int]]:
        """Every output, and the dimension of the tokens in it."""
        low_x = decode.low_rank(x[at], As)
        mixed, partial = decode.mix(gate[at], up[at], low[at], *stacks, weights[at], index[at], 0.6, "silu")
        return [
            *((t, 0) for t in decode.project(x[at], *rows)),
            (low_x, 1),
            *((t, 0) for t in decode.add_low_rank(low_x, [base[at], 2 * base[at]], Bs, 1.7)),
            (mixed, 0),
            (partial, 1),
            (decode.combine(base[at], low_down[at], index[at], down_B, 0.6), 0),
        ]

    monkeypatch.setattr(triton_single, "TOKENS", tokens)
    monkeypatch.setattr(triton_single, "PROJECT_TOKENS", tokens)
    together = run(slice(tokens))
    alone = [run(slice(t, t + 1)) for t in range(tokens)]
    for i, (value, dim) in enumerate(together):
        assert torch.equal(value, torch.cat([one[i][0] for one in alone], dim=dim))
    monkeypatch.setattr(triton_single, "TOKENS", 0)
    monkeypatch.setattr(triton_single, "PROJECT_TOKENS", 0)
    for (value, _), (expected, _) in zip(together, run(slice(tokens)), strict=True):
        near(value, expected, TOLERANCE[torch.float32])
