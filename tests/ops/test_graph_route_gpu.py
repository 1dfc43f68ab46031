"""The fused graph router on a GPU, at real shapes: its precision, its capture, its time."""

import pytest
import torch
from torch import Tensor

pytest.importorskip("triton")
from router_case import OUTPUTS, Case

pytestmark = [
    pytest.mark.usefixtures("poisoned_memory"),
    pytest.mark.gpu,
    pytest.mark.filterwarnings("ignore:Deterministic behavior was enabled:UserWarning"),
]


def big_case(g: int, **options) -> Case:
    return Case(tokens=8192, d=4096, g=g, num_experts=8, dtype=torch.bfloat16, **options)


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


@pytest.mark.parametrize(("g", "self_weight"), [(64, True), (64, False), (256, False)])
def test_time_at_real_shapes(g, self_weight):
    """Prints the time of forward and backward, replayed, and every kernel's; the must is 0.5 ms, the goal 0.26.

    The widths and self terms of the presets; both at their largest, which none has, take 0.6 ms.
    """
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
