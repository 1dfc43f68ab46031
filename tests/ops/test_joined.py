"""When gate and up are one matrix."""

import pytest
import torch
from torch import nn

from graphlora.ops.expert_ffn.joined import joined


@pytest.fixture
def weight():
    values = torch.randn(12, 4, generator=torch.Generator().manual_seed(0))
    return nn.Parameter(values, requires_grad=False)


def test_halves_of_one_weight_are_one_matrix_in_its_memory(weight):
    gate, up = weight.chunk(2)
    both = joined(gate, up)
    assert torch.equal(both, weight)
    up[0, 0] = 7.0
    assert both[6, 0] == 7.0


def test_others_are_not(weight):
    gate, up = weight.chunk(2)
    assert joined(up, gate) is None
    assert joined(gate, up.clone()) is None
    assert joined(gate[:, :2], up[:, :2]) is None
    assert joined(gate[:3], up) is None
    assert joined(gate[:3], gate[:3]) is None
    assert joined(gate, up.double()) is None


def test_compilers_see_two_matrices(weight):
    weights = weight.chunk(2)
    found = []

    def look(x):
        found.append(joined(*weights))
        return x + 1

    torch.compile(look, backend="eager")(torch.ones(1))
    assert found[-1] is None
