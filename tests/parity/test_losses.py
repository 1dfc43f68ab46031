"""Both coordination losses in the released code's form equal its recorded values and gradients."""

import re

import pytest
import torch

from graphlora.losses import normal_balance, poisson_distinction
from graphlora.tuner.coordination import Coordination

FORM = "abs_log_ratio"
CASES = ("l1_n8", "l3_n8", "l2_n4", "l4_n12", "l28_n8")
LAMBDAS = ("1.0", "1.5", "1.9", "0.5_clamped", "2.5_clamped", "mixed")


@pytest.fixture(scope="module")
def recorded(parity):
    return parity.read("losses.safetensors")


def coordinations(parity, num_layers, num_experts, rates=None, scales=None):
    """State of `num_layers` blocks under `preset="released"`, with recorded lambda and theta."""
    config = parity.released_config()
    blocks = [
        Coordination(num_experts, config.poisson_rate_form, config.normal_scale_form)
        for _ in range(num_layers)
    ]
    with torch.no_grad():
        for i, block in enumerate(blocks):
            if rates is not None:
                block.poisson_rate_bias.copy_(rates[i] - 1.5)
            if scales is not None:
                block.normal_scale_bias.copy_(scales[i] - num_experts / 2)
    return blocks


def rate_gradients(blocks):
    return torch.stack([block.poisson_rate_bias.grad for block in blocks])


def scale_gradients(blocks):
    return torch.stack([block.normal_scale_bias.grad for block in blocks])


def poisson(probs, blocks):
    return poisson_distinction(probs, torch.stack([b.poisson_rate for b in blocks]), FORM).mean()


def normal(counts, blocks):
    return normal_balance(
        counts, torch.stack([b.normal_scale for b in blocks]), FORM, across_layers=True
    ).mean()


def assert_loss(ours, recorded, parity):
    torch.testing.assert_close(ours.detach(), recorded, rtol=parity.tolerance.losses, atol=0)


@pytest.mark.parametrize("key", LAMBDAS)
@pytest.mark.parametrize("case", CASES)
def test_poisson(recorded, parity, case, key):
    name = f"{case}.poisson.lambda_{key}"
    probs = recorded[f"{case}.probs"].clone().requires_grad_()
    num_layers, _, num_experts = probs.shape
    blocks = coordinations(parity, num_layers, num_experts, rates=recorded[f"{name}.lambda"])
    loss = poisson(probs, blocks)
    assert_loss(loss, recorded[f"{name}.loss"], parity)
    loss.backward()
    parity.gradient(probs.grad, recorded[f"{name}.grad_probs"])
    parity.gradient(rate_gradients(blocks), recorded[f"{name}.grad_lambda"])


@pytest.mark.parametrize("rate", [1.0, 1.5, 1.9])
def test_poisson_with_many_experts(recorded, parity, rate):
    """The authors' backward fails for more than 32 experts; ours is finite."""
    probs = recorded["l2_n40.probs"].clone().requires_grad_()
    blocks = coordinations(parity, 2, 40, rates=torch.full((2,), rate))
    loss = poisson(probs, blocks)
    assert_loss(loss, recorded[f"l2_n40.poisson.lambda_{rate}.loss"], parity)
    loss.backward()
    assert probs.grad.isfinite().all()
    assert rate_gradients(blocks).isfinite().all()


@pytest.mark.parametrize("key", ["half_N", "1.0", "mixed"])
@pytest.mark.parametrize("case", CASES)
def test_normal(recorded, parity, case, key):
    name = f"{case}.normal.theta_{key}"
    counts = recorded[f"{case}.counts"].clone().requires_grad_()
    blocks = coordinations(parity, *counts.shape, scales=recorded[f"{name}.theta"])
    loss = normal(counts, blocks)
    assert_loss(loss, recorded[f"{name}.loss"], parity)
    loss.backward()
    parity.gradient(counts.grad, recorded[f"{name}.grad_counts"])
    parity.gradient(scale_gradients(blocks), recorded[f"{name}.grad_theta"])


@pytest.mark.parametrize("case", CASES)
def test_weighted_sum(recorded, parity, case):
    config = parity.released_config()
    probs = recorded[f"{case}.probs"].clone().requires_grad_()
    counts = recorded[f"{case}.counts"].clone().requires_grad_()
    blocks = coordinations(parity, *counts.shape)
    loss = config.router_poisson_loss_coef * poisson(probs, blocks)
    loss = loss + config.router_normal_loss_coef * normal(counts, blocks)
    assert_loss(loss, recorded[f"{case}.total.loss"], parity)
    loss.backward()
    parity.gradient(probs.grad, recorded[f"{case}.total.grad_probs"])
    parity.gradient(counts.grad, recorded[f"{case}.total.grad_counts"])
    parity.gradient(rate_gradients(blocks), recorded[f"{case}.total.grad_lambda"])
    parity.gradient(scale_gradients(blocks), recorded[f"{case}.total.grad_theta"])


def test_every_recorded_case_is_compared(recorded):
    found = {re.split(r"\.(?=probs|counts|poisson|normal|total)", name)[0] for name in recorded}
    assert found == {*CASES, "l2_n40"}
