"""The suite `attention`: its candidates are what their names say, and a wrong one is not timed."""

import pytest
import torch
from benchmarks.context import Context, Gate
from benchmarks.gate import relative_error
from benchmarks.registry import SUITES
from benchmarks.shapes import TINY
from benchmarks.suites import attention
from torch import nn

from graphlora.ops import lora_linear
from graphlora.tuner import shared_input

CPU = torch.device("cpu")
# Dynamo of torch 2.13 makes an instance of the function it traces and warns about it.
pytestmark = pytest.mark.filterwarnings("ignore:.*should not be instantiated:DeprecationWarning")


@pytest.fixture
def base():
    torch.manual_seed(0)
    return attention.Projections(TINY).requires_grad_(False)


@pytest.fixture
def inputs():
    generator = torch.Generator().manual_seed(0)
    return [torch.randn(9, 32, generator=generator, requires_grad=True) for _ in range(2)]


def test_every_candidate_is_timed_forward_and_backward():
    case = SUITES["attention"].tiny[0]
    context = Context(case, CPU, torch.float32, True, Gate({torch.float32: []}))
    attention.measure(context)
    assert {(m.candidate, m.phase) for m in context.found} == {
        (name, phase) for name in case.params["candidates"] for phase in ("forward", "backward", "full")
    }
    assert all(m.status == "ok" and m.value > 0 for m in context.found)


@pytest.mark.parametrize("way", ["peft_float32", "peft_bfloat16", "apart", "together"])
def test_candidates_are_the_frozen_projections_with_their_pairs(base, inputs, way):
    model = attention.adapted(base, way, 2)
    pairs = {}
    for name, parameter in model.named_parameters():
        if "lora_" in name and "mlp" not in name:
            projection = next(p for p in attention.NAMES if p in name)
            pairs.setdefault(projection, {})["A" if "lora_A" in name else "B"] = parameter
    found = model.forward(*inputs)
    for name, out, x in zip(attention.NAMES, found, [inputs[0]] * 3 + [inputs[1]], strict=True):
        A, B = pairs[name]["A"].float(), pairs[name]["B"].float()
        weight = getattr(base.self_attn, name).weight
        torch.testing.assert_close(out, x @ weight.T + 8 * (x @ A.T) @ B.T, rtol=1e-2, atol=1e-2)
        assert relative_error(nn.functional.linear(x, weight), out) > 0.1


def test_together_is_one_call_and_apart_three(base, inputs, monkeypatch):
    sizes = []

    def counted(x, matrices, *rest):
        sizes.append(len(matrices))
        return lora_linear.lora_linears(x, matrices, *rest)

    monkeypatch.setattr(shared_input, "lora_linears", counted)
    for way in ("together", "apart"):
        attention.adapted(base, way, 2).forward(*inputs)
    assert sizes == [3, 1, 1, 1, 1, 1]


def test_a_wrong_candidate_is_not_timed(base, inputs):
    grads = [torch.ones(9, width) for width in (32, 16, 16, 32)]
    made = {
        name: attention.Candidate(attention.adapted(base, name, 2), *inputs, grads, None)
        for name in ("together", "apart")
    }
    attention.compare(made)
    with torch.no_grad():
        made["apart"].trained[0].mul_(2)
    with pytest.raises(AssertionError, match="apart is not together"):
        attention.compare(made)
