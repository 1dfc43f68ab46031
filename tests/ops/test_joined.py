"""When gate and up are one matrix."""

import pytest
import torch
from torch import nn

from graphlora.ops.expert_ffn.joined import join, joined


@pytest.fixture
def weights():
    generator = torch.Generator().manual_seed(0)
    return [nn.Parameter(torch.randn(6, 4, generator=generator), requires_grad=False) for _ in range(2)]


def test_joined_weights_are_one_matrix_in_their_own_memory(weights):
    gate, up = weights
    values = torch.cat([gate, up])
    join(gate, up)
    both = joined(gate, up)
    assert torch.equal(both, values)
    assert torch.equal(torch.cat([gate, up]), values)
    with torch.no_grad():
        up[0, 0] = 7.0
    assert both[6, 0] == 7.0
    assert not both.requires_grad


def test_others_are_not(weights):
    gate, up = weights
    assert joined(gate, up) is None
    join(gate, up)
    assert joined(up, gate) is None
    assert joined(gate, nn.Parameter(up.detach().clone())) is None
    assert joined(gate[:, :2], up[:, :2]) is None
    assert joined(gate[:3], up) is None
    moved = [nn.Parameter(t.detach().double(), requires_grad=False) for t in (gate, up)]
    assert joined(*moved) is None


def test_compilers_see_two_matrices(weights):
    join(*weights)
    found = []

    def look(x):
        found.append(joined(*weights))
        return x + 1

    torch.compile(look, backend="eager")(torch.ones(1))
    assert found[-1] is None
