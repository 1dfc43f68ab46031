"""Sums over tokens in one kernel per direction against PyTorch's: values and every gradient."""

import pytest
import torch
from torch import Tensor

pytest.importorskip("triton")
from graphlora.ops.backend import interprets_triton
from graphlora.ops.routing_sums import RoutingSums, routing_sums_torch
from graphlora.ops.routing_sums.triton import routing_sums_triton
from graphlora.router import select_experts

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
pytestmark = [
    pytest.mark.skipif(
        DEVICE == "cpu" and not interprets_triton(), reason="neither a CUDA device nor the interpreter"
    ),
    pytest.mark.filterwarnings("ignore:Deterministic behavior was enabled:UserWarning"),
]


@pytest.fixture(autouse=True)
def _poison(monkeypatch):
    """Every new buffer starts as NaN, so that what a kernel leaves unwritten shows."""
    torch.use_deterministic_algorithms(True, warn_only=True)
    monkeypatch.setattr(torch.utils.deterministic, "fill_uninitialized_memory", True)
    yield
    torch.use_deterministic_algorithms(False)


def run(path, tokens, num_experts, top_k, num_layers=3, is_masked=True, **settings) -> dict[str, Tensor]:
    generator = torch.Generator().manual_seed(tokens)
    logits = 3 * torch.randn(num_layers, tokens, num_experts, generator=generator).to(DEVICE)
    log_target = torch.randn(num_layers, num_experts, generator=generator).log_softmax(-1).to(DEVICE)
    mask = (torch.rand(tokens, generator=generator) > 0.3).to(DEVICE) if is_masked else None
    leaves = logits.flatten(0, 1).requires_grad_(), log_target.requires_grad_()
    routing = select_experts(leaves[0], top_k)
    shape = (num_layers, tokens)
    probs = routing.router_probs.view(*shape, num_experts)
    weights, index = (t.view(*shape, top_k) for t in (routing.top_k_weights, routing.top_k_index))
    options = {"absolute": False, "eps": 1e-16, "count_probs": False} | settings
    sums: RoutingSums = path(logits, probs, weights, index, mask, log_target, **options)
    steps = torch.arange(1.0, num_experts + 1, device=DEVICE)
    loss = (sums.load * steps).sum() + (sums.divergence * steps.flip(0)).sum()
    grads = dict(zip(("logits", "log_target"), torch.autograd.grad(loss, leaves), strict=True))
    assert not sums.logits.requires_grad and not sums.count.requires_grad
    values = {name: value.detach() for name, value in sums._asdict().items()}
    return values | {f"grad of {name}": grad for name, grad in grads.items()}


@pytest.mark.parametrize("settings", [{}, {"absolute": True}, {"count_probs": True, "absolute": True}])
@pytest.mark.parametrize(
    ("tokens", "num_experts", "top_k", "is_masked"),
    [(21, 8, 2, True), (260, 5, 3, False), (1, 1, 1, False), (0, 4, 2, False), (3, 33, 8, True)],
)
def test_equals_the_sums_in_pytorch(tokens, num_experts, top_k, is_masked, settings):
    found, expected = (
        run(
            path,
            tokens,
            num_experts,
            top_k,
            num_layers=1 if tokens > 100 else 3,
            is_masked=is_masked,
            **settings,
        )
        for path in (routing_sums_triton, routing_sums_torch)
    )
    for name, value in expected.items():
        error = float((found[name] - value).norm() / value.norm().clamp_min(1.0))
        assert error < 1e-6, f"{name}: {error:.2e}"


def test_masked_tokens_count_nowhere():
    """A token whose flag is 0 may hold anything but infinities."""
    probs = torch.tensor([[[0.7, 0.3], [0.5, 0.5]]], device=DEVICE)
    weights, index = torch.ones(1, 2, 1, device=DEVICE), torch.tensor([[[0], [1]]], device=DEVICE)
    mask = torch.tensor([1, 0], device=DEVICE)
    target = torch.tensor([[0.8, 0.2]], device=DEVICE).log()
    sums = routing_sums_triton(
        probs, probs, weights, index, mask, target, absolute=False, eps=1e-16, count_probs=False
    )
    assert sums.load.tolist() == [[1.0, 0.0]] and sums.count.tolist() == [1.0]
    torch.testing.assert_close(sums.logits, probs[:, 0])
    torch.testing.assert_close(sums.divergence, target - probs[:, 0].log())


def test_sums_repeat_bit_for_bit():
    first, second = (run(routing_sums_triton, 260, 4, 2, num_layers=1) for _ in range(2))
    assert all(torch.equal(value, second[name]) for name, value in first.items())


@pytest.mark.gpu
@pytest.mark.parametrize("absolute", [False, True])
def test_real_shapes(absolute):
    found, expected = (
        run(path, 8192, 8, 2, num_layers=32, absolute=absolute)
        for path in (routing_sums_triton, routing_sums_torch)
    )
    for name, value in expected.items():
        assert float((found[name] - value).norm() / value.norm()) < 1e-6, name
