"""Equations 6 to 9, against numbers worked out by hand, and the properties the paper relies on."""

from math import log

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from graphlora import GraphLoraConfig
from graphlora.losses import (
    divergence,
    normal_balance,
    normal_target,
    poisson_distinction,
    poisson_target,
    switch_balance,
)
from graphlora.tuner.coordination import Coordination

EPS = 1e-16


def tensor(*values):
    return torch.tensor(values)


def distributions(size):
    weights = st.lists(st.floats(0.01, 1.0), min_size=size, max_size=size)
    return weights.map(lambda w: torch.tensor(w, dtype=torch.float64) / sum(w))


# --- the Poisson distinction loss --------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("rate", "expected"),
    [
        (1.0, [0.6, 0.3, 0.1]),  # 1, 1/2, 1/6
        (2.0, [0.375, 0.375, 0.25]),  # 2, 2, 4/3
        (1.5, [0.47058824, 0.35294118, 0.17647059]),  # 3/2, 9/8, 9/16
    ],
)
def test_poisson_target(rate, expected):
    torch.testing.assert_close(poisson_target(torch.tensor(rate), 3), torch.tensor(expected))


@given(st.floats(1.0, 2.0), st.integers(1, 64))
def test_poisson_target_sums_to_one_and_never_increases(rate, num_experts):
    target = poisson_target(torch.tensor(rate), num_experts)
    assert target.sum().item() == pytest.approx(1, abs=1e-5)
    assert (target.diff() <= 1e-6).all()


def test_poisson_target_of_a_larger_rate_increases_first():
    assert (poisson_target(torch.tensor(3.0), 8).diff() > 0).any()


def test_poisson_distinction_by_hand():
    probs = tensor([0.1, 0.6, 0.3], [0.25, 0.5, 0.25])
    second = 0.6 * log(0.6 / 0.5) + 0.3 * log(0.3 / 0.25) + 0.1 * log(0.1 / 0.25)
    torch.testing.assert_close(
        poisson_distinction(probs, torch.tensor(1.0)), tensor(0.0, second), atol=1e-6, rtol=0
    )


@given(distributions(6), st.permutations(range(6)), st.floats(1.0, 2.0))
def test_poisson_distinction_does_not_depend_on_which_expert_is_which(probs, order, rate):
    rate = torch.tensor(rate)
    torch.testing.assert_close(
        poisson_distinction(probs[None], rate), poisson_distinction(probs[None, order], rate)
    )


@pytest.mark.parametrize("num_experts", [40, 128])
@pytest.mark.parametrize("form", ["kl", "abs_log_ratio"])
def test_poisson_distinction_of_many_experts_is_finite(num_experts, form):
    logits = torch.randn(3, num_experts, generator=torch.Generator().manual_seed(0), requires_grad=True)
    rate = torch.tensor(1.5, requires_grad=True)
    loss = poisson_distinction(logits.softmax(-1), rate, form).mean()
    loss.backward()
    assert loss.isfinite() and logits.grad.isfinite().all() and rate.grad.isfinite()


# --- the divergence ----------------------------------------------------------------------------------------------


def test_both_forms_by_hand():
    target, observed = tensor(0.75, 0.25), tensor(0.5, 0.5)
    kl = 0.75 * log(1.5) - 0.25 * log(2)
    assert divergence(target, observed, "kl", EPS).item() == pytest.approx(kl)
    released = 0.75 * log(1.5) + 0.25 * log(2)
    assert divergence(target, observed, "abs_log_ratio", EPS).item() == pytest.approx(released)


@given(distributions(5), distributions(5))
def test_kl_is_zero_only_for_equal_distributions(target, observed):
    distance = (target - observed).abs().sum()
    value = divergence(target, observed, "kl", EPS)
    assert value >= distance**2 / 2 - 1e-12  # Pinsker's inequality
    assert divergence(target, target, "kl", EPS).abs() < 1e-12


# --- the normal balance loss -------------------------------------------------------------------------------------


def test_normal_target_by_hand():
    """N = 4, sigma = 2: densities 1, e^-1/8 twice, e^-1/2, around mu = 2."""
    expected = tensor([0.29660, 0.26175, 0.26175, 0.17990])
    torch.testing.assert_close(normal_target(tensor(2.0), 4), expected, atol=1e-5, rtol=0)


@given(st.integers(1, 33), st.floats(0.3, 40.0))
def test_normal_target_is_the_same_where_counting_starts_at_zero(num_experts, scale):
    i = torch.arange(num_experts, dtype=torch.float64)
    density = torch.exp(-((i - num_experts / 2) ** 2) / (2 * scale**2))
    expected = (density / density.sum()).sort(descending=True).values
    ours = normal_target(torch.tensor([scale]), num_experts)[0]
    torch.testing.assert_close(ours.double(), expected, atol=2e-6, rtol=0)


def test_normal_target_per_layer_and_across_layers():
    scales = tensor(4.0, 2.0, 4.0)
    torch.testing.assert_close(normal_target(scales, 8).sum(dim=-1), torch.ones(3))
    across = normal_target(scales, 8, across_layers=True)
    assert across.sum().item() == pytest.approx(1)
    equal = normal_target(torch.full((5,), 4.0), 8, across_layers=True)
    torch.testing.assert_close(equal.sum(dim=-1), torch.full((5,), 0.2))


def test_normal_balance_takes_loads_in_any_unit_and_order():
    loads = tensor([3.0, 1.0, 2.0, 2.0], [300.0, 200.0, 100.0, 200.0])
    values = normal_balance(loads, tensor(2.0, 2.0))
    torch.testing.assert_close(values[0], values[1])
    target = normal_target(tensor(2.0), 4)[0]
    observed = tensor(0.375, 0.25, 0.25, 0.125)
    assert values[0].item() == pytest.approx((target * (target / observed).log()).sum().item(), abs=1e-6)


def test_normal_balance_of_the_target_is_zero():
    torch.testing.assert_close(normal_balance(normal_target(tensor(4.0), 8), tensor(4.0)), tensor(0.0))


def collapsed(num_experts, share=0.93):
    loads = torch.full((1, num_experts), (1 - share) / (num_experts - 1))
    loads[0, 0] = share
    return loads


def test_form_of_the_released_code_prefers_collapsed_loads():
    """Normalizing over 28 layers at once makes balanced loads cost more than loads that are 93% on one expert."""
    scales = torch.full((28,), 4.0)
    loads = {
        "uniform": torch.full((28, 8), 1 / 8),
        "target": normal_target(scales, 8),
        "collapsed": collapsed(8).expand(28, -1),
    }
    values = {
        name: normal_balance(load, scales, "abs_log_ratio", across_layers=True).mean().item()
        for name, load in loads.items()
    }
    assert values == pytest.approx({"uniform": 0.1186, "target": 0.1190, "collapsed": 0.0521}, abs=5e-5)


@given(st.sampled_from([4, 8, 16]), st.floats(-60.0, 60.0))
def test_default_prefers_balanced_loads_whatever_sigma_becomes(num_experts, bias):
    config = GraphLoraConfig()
    coordination = Coordination(num_experts, config.poisson_rate_form, config.normal_scale_form)
    with torch.no_grad():
        coordination.normal_scale_bias.fill_(bias)
    scale = coordination.normal_scale.detach()[None]
    assert scale >= num_experts / 4
    cost = [
        normal_balance(loads, scale, config.divergence, config.normal_target == "all_layers").item()
        for loads in (torch.full((1, num_experts), 1.0), collapsed(num_experts))
    ]
    assert cost[1] > cost[0] + 0.5


@pytest.mark.parametrize(("form", "expensive"), [("bounded", True), ("free", False)])
def test_collapsed_loads_after_a_thousand_steps_of_sigma(form, expensive):
    """Sigma follows collapsed loads as far as its form lets it: trained freely it cancels the loss."""
    coordination = Coordination(8, "smooth", form)
    optimizer = torch.optim.Adam([coordination.normal_scale_bias], lr=0.01)
    loads = collapsed(8)
    start = normal_balance(loads, coordination.normal_scale[None]).item()
    for _ in range(1000):
        optimizer.zero_grad()
        loss = normal_balance(loads, coordination.normal_scale[None]).sum()
        loss.backward()
        optimizer.step()
    assert (loss.item() > start / 2) == expensive


@pytest.mark.parametrize("form", ["smooth", "clamp"])
def test_lambda_starts_at_one_and_a_half_and_stays_within_its_bounds(form):
    coordination = Coordination(8, form, "bounded")
    assert coordination.poisson_rate.item() == 1.5
    assert coordination.normal_scale.item() == 4.0
    for bias in (-30.0, -0.7, 0.2, 30.0):
        with torch.no_grad():
            coordination.poisson_rate_bias.fill_(bias)
        assert 1 <= coordination.poisson_rate.item() <= 2


# --- the baselines' balance loss ------------------------------------------------------------------------------------


def switch(logits, top_k=2, mask=None):
    probs = logits.softmax(dim=-1)
    return switch_balance(probs, probs.topk(top_k).indices, mask)


def test_switch_balance_is_top_k_where_the_load_is_even():
    logits = 1e-4 * torch.stack([torch.eye(8)[i] + torch.eye(8)[(i + 1) % 8] for i in range(8)])
    torch.testing.assert_close(switch(logits), torch.tensor(2.0), rtol=0, atol=1e-3)


def test_a_collapsed_router_is_expensive():
    """Applying the softmax twice, as the released baseline does, would hide the collapse: 3.0 instead of 7.7."""
    logits = torch.tensor([4.0, 3.0, -1.0, -1.0, -1.0, -1.0, -1.0, -1.0]).expand(16, 8)
    assert 7.5 < float(switch(logits)) < 8.0
    assert float(switch(logits.softmax(dim=-1))) < 3.5


def test_switch_balance_ignores_padding_and_moves_probabilities_alone():
    logits = torch.randn(6, 4, generator=torch.Generator().manual_seed(0)).requires_grad_()
    mask = torch.tensor([True, True, True, True, False, False])
    value = switch(logits, mask=mask)
    torch.testing.assert_close(value, switch(logits[:4]))
    (grad,) = torch.autograd.grad(value, logits)
    assert grad[:4].abs().sum() > 0
    assert grad[4:].abs().sum() == 0
