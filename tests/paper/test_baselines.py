"""The other methods' gates and losses, against numbers worked out by hand from their formulas."""

from math import exp, log, sqrt

import pytest
import torch

from graphlora.experts import LoraExperts, lora_delta_loop, mixed_lora_delta
from graphlora.gates import SparsegenRouter, dense_gate, sparsegen_gate, top_p_gate
from graphlora.load import batch_load
from graphlora.losses import (
    localized_balance,
    selection_balance,
    sparsity_excess,
    switch_balance,
    tsallis_entropy,
    weighted_balance,
)
from graphlora.router import LinearRouter

PLAIN = {"input_norm": False, "centering": False, "seed": 0, "spread": 1.0}


def logits_of(*probs):
    """Logits `[1, experts]` whose softmax is `probs`."""
    return torch.tensor([probs]).log()


# --- gates ----------------------------------------------------------------------------------------------------------


def test_dense_gate():
    """LoRAMoE and HydraLoRA: u = ln(1, 2, 5), so w = (1, 2, 5) / 8."""
    routing = dense_gate(torch.tensor([[log(1), log(2), log(5)]]))
    torch.testing.assert_close(routing.router_probs, torch.tensor([[0.125, 0.25, 0.625]]))
    assert routing.top_k_index.tolist() == [[2, 1, 0]]
    torch.testing.assert_close(routing.top_k_weights, torch.tensor([[0.625, 0.25, 0.125]]))


def test_gate_of_ming_moe():
    """W z + b = (ln 6, ln 1, ln 3); the two largest, then a softmax over them: 6/9 and 3/9."""
    router = LinearRouter(2, 3, bias=True, **PLAIN)
    with torch.no_grad():
        router.weight.copy_(torch.tensor([[1.0, 0.0], [0.0, 0.0], [0.0, 1.0]]))
        router.bias.copy_(torch.tensor([0.0, 0.0, -log(4)]))
    routing = router.route(torch.tensor([[log(6), log(12)]]), "torch", 2)
    assert routing.top_k_index.tolist() == [[0, 2]]
    torch.testing.assert_close(routing.top_k_weights, torch.tensor([[6 / 9, 3 / 9]]))
    assert router.bias.requires_grad


@pytest.mark.parametrize(
    ("top_k", "top_p", "threshold", "expected"),
    [
        (1, 0.75, 0.7, [0.5, 0.3, 0.0, 0.0]),  # 0.5 is not enough, 0.5 + 0.3 is
        (1, 0.40, 0.7, [0.5, 0.0, 0.0, 0.0]),
        (2, 0.40, 0.7, [0.5, 0.3, 0.0, 0.0]),  # at least K
        (1, 0.90, 0.7, [0.5, 0.3, 0.15, 0.0]),
        (1, 0.40, 0.6, [0.5, 0.3, 0.15, 0.05]),  # S_2 = 1 - 0.25 - 0.09 - 0.0225 - 0.0025 = 0.635
    ],
)
def test_gate_of_dynmole(top_k, top_p, threshold, expected):
    routing = top_p_gate(logits_of(0.15, 0.5, 0.05, 0.3), top_k, top_p, 2.0, threshold)
    assert routing.top_k_index.tolist() == [[1, 3, 0, 2]]
    torch.testing.assert_close(routing.top_k_weights, torch.tensor([expected]))
    torch.testing.assert_close(routing.router_probs, torch.tensor([[0.15, 0.5, 0.05, 0.3]]))
    load = batch_load(routing.top_k_weights, routing.top_k_index, 4, None)
    torch.testing.assert_close(load[[1, 3, 0, 2]], torch.tensor(expected))


@pytest.mark.parametrize(
    ("sparsity", "expected"),
    [
        (0.0, [0.75, 0.25, 0.0]),  # sparsemax: tau = (1 + 0.5 - 1) / 2 = 0.25
        (0.5, [1.0, 0.0, 0.0]),  # tau = 1 - 1 + 0.5 = 0.5
        (-1.0, [0.625, 0.375, 0.0]),  # tau = (1 + 0.5 - 1 - 1) / 2 = -0.25, divided by 2
        (-4.0, [0.5, 0.4, 0.1]),  # tau = (1 + 0.5 - 1 - 1 - 4) / 3 = -1.5, divided by 5
    ],
)
def test_gate_of_ld_mole(sparsity, expected):
    routing = sparsegen_gate(torch.tensor([[0.5, -1.0, 1.0]]), torch.tensor([sparsity]))
    assert routing.top_k_index.tolist() == [[2, 0, 1]]
    torch.testing.assert_close(routing.top_k_weights, torch.tensor([expected]))
    torch.testing.assert_close(routing.router_probs[0, [2, 0, 1]], torch.tensor(expected))
    assert routing.sparsity.tolist() == [sparsity]


def test_weights_of_ld_mole_are_positive_sum_to_one_and_have_the_right_gradient():
    generator = torch.Generator().manual_seed(0)
    logits = torch.randn(50, 6, generator=generator, dtype=torch.float64).float().requires_grad_()
    sparsity = (torch.nn.functional.logsigmoid(torch.randn(50, generator=generator)) + 0.99).requires_grad_()
    weights = sparsegen_gate(logits, sparsity).router_probs
    torch.testing.assert_close(weights.sum(dim=1), torch.ones(50))
    assert (weights >= 0).all()
    assert (weights == 0).any()
    # Among the k selected, d pi_i / d u_j = (delta_ij - 1/k) / (1 - lam), and more sparsity spreads them apart.
    value = weights[0].square().sum()
    grad_logits, grad_sparsity = torch.autograd.grad(value, (logits, sparsity))
    kept = weights[0] > 0
    pi, k, rest = weights[0, kept].detach(), int(kept.sum()), float(1 - sparsity[0].detach())
    by_hand = 2 * (pi - pi.mean()) / rest
    torch.testing.assert_close(grad_logits[0, kept], by_hand, rtol=1e-4, atol=1e-5)
    assert not grad_logits[0, ~kept].any()
    torch.testing.assert_close(
        float(grad_sparsity[0]), float((2 * pi * (pi - 1 / k) / rest).sum()), rtol=1e-3, atol=1e-5
    )


def test_predicted_sparsity_of_ld_mole():
    """lam = logsigmoid(v . relu(W x + b) + c) + 0.99; here relu(3 - 1, -2 + 1) = (2, 0), times 0.5, plus -1: 0."""
    router = SparsegenRouter(2, 3, width=2, **PLAIN)
    assert router.sparsity_proj_bias.tolist() == [-2.5, -2.5]
    assert router.sparsity_out_bias.item() == -2.5
    with torch.no_grad():
        router.sparsity_proj.copy_(torch.tensor([[1.0, 0.0], [0.0, -1.0]]))
        router.sparsity_proj_bias.copy_(torch.tensor([-1.0, 1.0]))
        router.sparsity_out.copy_(torch.tensor([0.5, 7.0]))
        router.sparsity_out_bias.fill_(-1.0)
        router.weight.copy_(torch.tensor([[1.0, 0.0], [0.0, 1.0], [0.0, 0.0]]))
    x = torch.tensor([[3.0, 2.0]])
    lam = log(1 / (1 + exp(0))) + 0.99
    torch.testing.assert_close(router.sparsity(x), torch.tensor([lam]))
    routing = router.route(x, "torch", 2)
    torch.testing.assert_close(routing.sparsity, torch.tensor([lam]))
    # u = (3, 2, 0): 1 - lam = 0.703, so 0.703 + 2 * 2 < 3 + 2 and one expert has all.
    torch.testing.assert_close(routing.router_probs, torch.tensor([[1.0, 0.0, 0.0]]))


def test_router_of_mixlora_starts_normal():
    torch.manual_seed(0)
    weight = LinearRouter(512, 8, init="normal", **PLAIN).weight
    assert weight.std().item() == pytest.approx(0.02, rel=0.05)
    assert weight.abs().max() > 0.05


# --- experts --------------------------------------------------------------------------------------------------------


def test_delta_of_hydralora_by_hand():
    """One A = (1, 1), two B: A x = 3, so s (w_0 B_0 + w_1 B_1) A x = 0.5 (0.75 * 10 + 0.25 * 2) * 3."""
    x = torch.tensor([[1.0, 2.0]])
    lora_a = torch.tensor([[[1.0, 1.0]]])
    lora_b = torch.tensor([[[10.0]], [[2.0]]])
    mixing = torch.tensor([[0.75, 0.25]])
    for delta in (mixed_lora_delta, lora_delta_loop):
        torch.testing.assert_close(delta(x, lora_a, lora_b, mixing, 0.5), torch.tensor([[12.0]]))


def test_experts_of_hydralora_have_one_a():
    experts = LoraExperts(4, 64, 48, 2, shared_A=True)
    assert experts.lora_A.shape == (1, 2, 64)
    assert experts.lora_B.shape == (4, 48, 2)
    bound = 1 / sqrt(64)
    assert 0.9 * bound < experts.lora_A.abs().max() <= bound


# --- losses ---------------------------------------------------------------------------------------------------------

PROBS = torch.tensor([[0.7, 0.2, 0.1], [0.5, 0.1, 0.4]])
INDEX = torch.tensor([[0, 1], [0, 2]])
# Mean probabilities 0.6, 0.15, 0.25; both tokens select expert 0, one each the others.


def test_switch_form_by_hand():
    """MixLoRA: N sum F P = 3 (1 * 0.6 + 0.5 * 0.15 + 0.5 * 0.25)."""
    assert switch_balance(PROBS, INDEX).item() == pytest.approx(2.4)


def test_loss_of_mola_by_hand():
    """N sum f P = 3 (2/4 * 0.6 + 1/4 * 0.15 + 1/4 * 0.25): half of the Switch form at K = 2."""
    assert selection_balance(PROBS, INDEX).item() == pytest.approx(1.2)


def test_load_loss_of_ld_mole_by_hand():
    """Weights of zero are no selections: 3 of them, 2 of expert 0 and 1 of expert 2; 3 (2/3 * 0.6 + 1/3 * 0.25)."""
    weights = torch.tensor([[1.0, 0.0], [0.5, 0.5]])
    assert selection_balance(PROBS, INDEX, None, weights).item() == pytest.approx(1.45)
    assert switch_balance(PROBS, INDEX, None, weights).item() == pytest.approx(3 * (0.6 + 0.5 * 0.25))


@pytest.mark.parametrize("loss", [switch_balance, selection_balance])
def test_masks_and_stacked_routers(loss):
    mask = torch.tensor([True, False])
    first = loss(PROBS[:1], INDEX[:1])
    torch.testing.assert_close(loss(PROBS, INDEX, mask), first)
    both = loss(torch.stack([PROBS, PROBS.flip(1)]), torch.stack([INDEX, 2 - INDEX]))
    torch.testing.assert_close(both, loss(PROBS, INDEX).expand(2))


def test_load_loss_of_dynmole_by_hand():
    """Selected weights 0.7, 0.2 and 0.5, 0.4: N sum mean(w) mean(pi) = 3 (0.6 * 0.6 + 0.1 * 0.15 + 0.2 * 0.25)."""
    weights = torch.tensor([[0.7, 0.2, 0.0], [0.5, 0.0, 0.4]])
    assert weighted_balance(PROBS, weights).item() == pytest.approx(3 * 0.425)
    masked = weighted_balance(PROBS, weights, torch.tensor([0, 1]))
    assert masked.item() == pytest.approx(3 * (0.5 * 0.5 + 0.4 * 0.4))


@pytest.mark.parametrize(
    ("probs", "index", "expected"),
    [
        ([0.5, 0.3, 0.15, 0.05], 2.0, 0.635),
        ([1.0, 0.0, 0.0, 0.0], 1.1, 0.0),
        ([0.25, 0.25, 0.25, 0.25], 1.1, (1 - 4**-0.1) / 0.1),  # 1.294
        ([0.5, 0.5, 0.0, 0.0], 1.5, 2 - sqrt(2)),  # (1 - 2 * 2^-1.5) / 0.5
    ],
)
def test_tsallis_entropy_by_hand(probs, index, expected):
    assert tsallis_entropy(torch.tensor(probs), index).item() == pytest.approx(expected, abs=1e-6)


def test_tsallis_entropy_has_a_gradient_where_an_expert_has_nothing():
    probs = torch.tensor([1.0, 0.0], requires_grad=True)
    tsallis_entropy(probs, 1.1).backward()
    assert probs.grad.isfinite().all()


# Two samples of two tokens, two experts: Q = ((1.5, 0.5), (0.5, 1.5)).
WEIGHTS = torch.tensor([[[0.9, 0.1], [0.6, 0.4]], [[0.2, 0.8], [0.3, 0.7]]])


def test_constraint_of_loramoe_without_types_by_hand():
    """Z = Q has mean 1 and, over 4 - 1, variance 1/3."""
    assert localized_balance(WEIGHTS).item() == pytest.approx(1 / 3)
    assert localized_balance(WEIGHTS, squared=False).item() == pytest.approx(1 / 3)
    assert localized_balance(2 * WEIGHTS).item() == pytest.approx(1 / 3)
    assert localized_balance(2 * WEIGHTS, squared=False).item() == pytest.approx(2 / 3)
    assert localized_balance(WEIGHTS, delta=0.5).item() == pytest.approx(1 / 3)


@pytest.mark.parametrize(
    ("own", "expected"),
    [
        # Each sample uses its own experts more: Z = (1.5 * 0.5, 0.5 * 1.5, ...) = 0.75 everywhere.
        ([[False, True], [True, False]], 0.0),
        # Types the other way: Z = (2.25, 0.25, 0.25, 2.25), mean 1.25, variance 4 / 3, over 1.5625.
        ([[True, False], [False, True]], 4 / 3 / 1.5625),
    ],
)
def test_constraint_of_loramoe_with_types_by_hand(own, expected):
    value = localized_balance(WEIGHTS, same_type=torch.tensor(own), delta=0.5)
    assert value.item() == pytest.approx(expected, abs=1e-6)


def test_constraint_of_loramoe_ignores_padding():
    mask = torch.tensor([[True, False], [True, True]])
    z = torch.tensor([0.9, 0.1, 0.5, 1.5])
    expected = z.var().item() / z.mean().item() ** 2
    assert localized_balance(WEIGHTS, mask).item() == pytest.approx(expected)
    assert localized_balance(torch.ones(1, 3, 1)).item() == 0.0


@pytest.mark.parametrize(
    ("num_selected", "sparsity", "expected"),
    [
        (2, 0.5, 0.0),  # lower_2 = 1 - (1 + 1) - (0.5 + 1) = -2.5, which 0.5 is above
        (2, -3.0, 0.5),
        (1, 0.2, 0.3),  # lower_1 = 1 - (1 - 0.5) = 0.5
        (3, -9.0, 0.0),  # as many as there are
    ],
)
def test_sparsity_loss_of_ld_mole_by_hand(num_selected, sparsity, expected):
    logits = torch.tensor([[0.5, -1.0, 1.0]], requires_grad=True)
    value = sparsity_excess(logits, torch.tensor([sparsity]), num_selected)
    assert value.item() == pytest.approx(expected)
    assert not value.requires_grad


def test_where_the_sparsity_loss_is_zero_the_gate_selects_no_more():
    generator = torch.Generator().manual_seed(0)
    logits = torch.randn(200, 6, generator=generator)
    sparsity = torch.nn.functional.logsigmoid(2 * torch.randn(200, generator=generator)) + 0.99
    count = (sparsegen_gate(logits, sparsity).top_k_weights > 0).sum(dim=1)
    satisfied = sparsity_excess(logits, sparsity, 2) == 0
    assert satisfied.any()
    assert torch.equal(satisfied, count <= 2)
