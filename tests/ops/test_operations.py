"""Operations run through PyTorch's dispatcher where something traces, and directly elsewhere, with the same result."""

import pytest
import torch
from host_reads import Calls
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensorMode

pytest.importorskip("triton")
from graphlora.ops.backend import interprets_triton
from graphlora.ops.dropout.triton import _dropped, dropped
from graphlora.ops.operations import launches_kernels, operation

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
pytestmark = pytest.mark.skipif(
    DEVICE == "cpu" and not interprets_triton(), reason="neither a CUDA device nor the interpreter"
)


class Tagged(Tensor):
    pass


def arguments():
    return torch.ones(2, 3, device=DEVICE), torch.ones(1, dtype=torch.int32, device=DEVICE)


def test_a_plain_call_goes_to_the_implementation():
    for x in (torch.ones(2, 3), torch.nn.Parameter(torch.ones(2, 3))):
        assert operation("dropped", _dropped, x) is _dropped


def test_modes_see_the_operation():
    x, seed = arguments()
    with Calls() as calls:
        through = dropped(x, seed, 0.5)
    assert "graphlora.dropped.default" in calls.names
    assert torch.equal(through, dropped(x, seed, 0.5))


def test_tensors_of_another_class_go_through_the_dispatcher():
    x = torch.ones(2, 3).as_subclass(Tagged)
    assert operation("dropped", _dropped, x) is torch.ops.graphlora.dropped.default


def test_fake_tensors_are_not_computed_with():
    with FakeTensorMode():
        x, seed = arguments()
        assert dropped(x, seed, 0.5).shape == (2, 3)
    assert operation("dropped", _dropped, x) is torch.ops.graphlora.dropped.default


def test_compilers_see_the_operation():
    graphs = []

    def keep(module, _):
        graphs.append(str(module.graph))
        return module.forward

    compiled = torch.compile(dropped, backend=keep, fullgraph=True)
    x, seed = arguments()
    assert torch.equal(compiled(x, seed, 0.5), dropped(x, seed, 0.5))
    assert "graphlora.dropped" in graphs[0]


# Where there are GPUs, PyTorch asks them for the device of a tensor that it only pretends to make.
NO_SECOND_GPU = pytest.mark.skipif(torch.cuda.device_count() == 1, reason="needs two GPUs or none")


@pytest.mark.parametrize(
    ("home", "entered"),
    [pytest.param("cuda:1", ["cuda:1"], marks=NO_SECOND_GPU), ("cuda:0", []), ("cpu", [])],
)
def test_kernels_are_launched_on_the_device_of_the_first_tensor(monkeypatch, home, entered):
    """As a model needs that is spread over GPUs: Triton launches on the current device, whatever it is given."""
    seen = []

    class Device:
        def __init__(self, device):
            self.device = str(device)

        def __enter__(self):
            seen.append(self.device)

        def __exit__(self, *_):
            seen.append("left")

    monkeypatch.setattr(torch.cuda, "current_device", lambda: 0)
    monkeypatch.setattr(torch.cuda, "device", Device)
    with FakeTensorMode():
        x = torch.empty(2, device=home)

    @launches_kernels
    def run(first, second, *, scale):
        assert seen == entered
        assert second is x
        return scale

    assert run(None, x, scale=3) == 3
    assert seen == (entered and [*entered, "left"])
