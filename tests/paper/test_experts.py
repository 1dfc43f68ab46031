"""Equations 1, 2, 3 and 5: LoRA experts, mixed at each projection or as whole FFN blocks."""

from math import sqrt

import pytest
import torch
from torch.nn import functional as F

from graphlora.experts import LoraExperts, dense_mixing, lora_delta_loop, mixed_lora_delta
from graphlora.moe import MoeSettings, moe_ffn
from graphlora.ops.expert_ffn import ExpertWeights, FrozenFfn
from graphlora.ops.expert_ffn.activations import DifferentiableAct
from graphlora.router import select_experts

TOKENS, D, WIDE, N, R, K, SCALING = 7, 6, 10, 4, 2, 2, 1.5


@pytest.fixture
def random():
    generator = torch.Generator().manual_seed(0)
    return lambda *shape: torch.randn(*shape, generator=generator, dtype=torch.float64)


def test_new_experts_start_kaiming_uniform_and_zero():
    experts = LoraExperts(num_experts=8, in_features=64, out_features=48, r=4)
    assert experts.lora_A.shape == (8, 4, 64)
    assert experts.lora_B.shape == (8, 48, 4)
    assert not experts.lora_B.any()
    bound = 1 / sqrt(64)  # Kaiming uniform with a = sqrt 5: sqrt(6 / (1 + 5) / fan_in)
    largest = experts.lora_A.detach().abs().amax(dim=(1, 2))
    assert (largest <= bound).all() and (largest > 0.95 * bound).all()
    assert experts.lora_A.std().item() == pytest.approx(bound / sqrt(3), rel=0.05)
    assert not torch.equal(experts.lora_A[0], experts.lora_A[1])


def test_delta_by_hand():
    """Two experts of rank 1 on a projection from 2 to 1: 0.5 * (w_0 B_0 A_0 x + w_1 B_1 A_1 x)."""
    x = torch.tensor([[1.0, 2.0], [3.0, -1.0]])
    lora_a = torch.tensor([[[1.0, 1.0]], [[2.0, 0.0]]])
    lora_b = torch.tensor([[[10.0]], [[1.0]]])
    mixing = torch.tensor([[0.75, 0.25], [0.0, 1.0]])
    expected = torch.tensor([[0.5 * (0.75 * 30 + 0.25 * 2)], [0.5 * 6]])
    for delta in (mixed_lora_delta, lora_delta_loop):
        torch.testing.assert_close(delta(x, lora_a, lora_b, mixing, 0.5), expected)


def test_dense_mixing():
    weights, index = torch.tensor([[0.75, 0.25], [0.5, 0.5]]), torch.tensor([[2, 0], [1, 2]])
    expected = torch.tensor([[0.25, 0.0, 0.75], [0.0, 0.5, 0.5]])
    assert torch.equal(dense_mixing(weights, index, 3), expected)


class Case:
    """A frozen FFN with random experts, and what the equations give for it, in float64."""

    def __init__(self, random, gated):
        self.x = random(TOKENS, D)
        self.gate, self.up, self.down = (random(*shape) for shape in ((WIDE, D), (WIDE, D), (D, WIDE)))
        self.gated = gated
        pairs = [random(N, R, D), random(N, WIDE, R), random(N, R, D), random(N, WIDE, R), random(N, R, WIDE)]
        pairs.append(random(N, D, R))
        self.experts = ExpertWeights(*(pairs if gated else [None, None, *pairs[2:]]))
        self.act = F.silu if gated else F.relu
        self.ffn = FrozenFfn(
            lambda z: (z @ self.gate.T if gated else None, z @ self.up.T),
            lambda h: h @ self.down.T,
            DifferentiableAct(self.act),
        )
        self.routing = select_experts(random(TOKENS, N), K)

    def run(self, granularity, backend):
        settings = MoeSettings(granularity, SCALING, 0.0, 0.0, backend)
        return moe_ffn(self.x, self.ffn, self.experts, self.routing, settings)

    def weights(self, t):
        routing = self.routing
        return zip(routing.top_k_index[t].tolist(), routing.top_k_weights[t].double(), strict=True)

    def block_of_expert(self, x, e):
        """Equations 1 and 2: the whole block with the deltas of expert e."""
        w = self.experts
        up = (self.up + SCALING * w.up_B[e] @ w.up_A[e]) @ x
        gate = (self.gate + SCALING * w.gate_B[e] @ w.gate_A[e]) @ x if self.gated else None
        hidden = self.act(up) if gate is None else self.act(gate) * up
        return (self.down + SCALING * w.down_B[e] @ w.down_A[e]) @ hidden

    def mixed(self, z, weight, b, a, t):
        """Equation 3 as printed: one projection with the deltas of the selected experts."""
        return weight @ z + sum(w * SCALING * b[e] @ (a[e] @ z) for e, w in self.weights(t))


@pytest.fixture(params=[True, False], ids=["gated", "plain"])
def case(request, random):
    return Case(random, request.param)


@pytest.mark.parametrize("backend", ["eager", "torch"])
def test_block_is_the_weighted_sum_of_expert_blocks(case, backend):
    rows = [sum(w * case.block_of_expert(x, e) for e, w in case.weights(t)) for t, x in enumerate(case.x)]
    torch.testing.assert_close(case.run("ffn", backend), torch.stack(rows), atol=1e-6, rtol=1e-6)


@pytest.mark.parametrize("backend", ["eager", "torch"])
def test_block_with_experts_mixed_at_each_projection(case, backend):
    w, rows = case.experts, []
    for t, x in enumerate(case.x):
        up = case.mixed(x, case.up, w.up_B, w.up_A, t)
        hidden = (
            case.act(case.mixed(x, case.gate, w.gate_B, w.gate_A, t)) * up if case.gated else case.act(up)
        )
        rows.append(case.mixed(hidden, case.down, w.down_B, w.down_A, t))
    torch.testing.assert_close(case.run("linear", backend), torch.stack(rows), atol=1e-6, rtol=1e-6)


@pytest.mark.parametrize("granularity", ["ffn", "linear"])
@pytest.mark.parametrize("backend", ["eager", "torch"])
def test_untouched_experts_change_nothing(case, granularity, backend):
    zeros = {
        name: torch.zeros_like(t)
        for name, t in case.experts._asdict().items()
        if t is not None and "_B" in name
    }
    case.experts = case.experts._replace(**zeros)
    gate, up = case.ffn.project_in(case.x)
    hidden = case.act(up) if gate is None else case.act(gate) * up
    torch.testing.assert_close(
        case.run(granularity, backend), case.ffn.project_out(hidden), atol=1e-6, rtol=1e-6
    )
