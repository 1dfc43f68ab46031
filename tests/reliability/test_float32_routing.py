"""Routers and losses under autocast, and with a loss scaler."""

import pytest
import torch
from reliability.float32_routing import (
    DTYPES,
    PRESETS,
    VOCABULARY,
    loss_difference,
    make_model,
    router_differences,
)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("preset", PRESETS)
def test_autocast_changes_no_bit_of_routing_and_losses(preset, dtype):
    assert router_differences(preset, 0, dtype) == 0
    assert loss_difference(preset, 0, dtype) == 0.0


@pytest.mark.parametrize("scale", [2.0**10, 2.0**120])
def test_float16_with_a_scaler(scale):
    """At a usable scale the gradients are those without it; at one that overflows the step is left out."""
    model = make_model("graphlora", 0)
    parameters = [p for p in model.parameters() if p.requires_grad]
    optimizer = torch.optim.AdamW(parameters, lr=1e-2)
    scaler = torch.amp.GradScaler("cpu", init_scale=scale)
    ids = torch.randint(1, VOCABULARY, (3, 17), generator=torch.Generator().manual_seed(0))
    with torch.autocast("cpu", dtype=torch.float16):
        out = model(input_ids=ids, labels=ids)
    assert out.aux_loss.dtype == out.loss.dtype == torch.float32
    expected = torch.autograd.grad(out.loss, parameters, retain_graph=True, allow_unused=True)
    before = [p.detach().clone() for p in parameters]
    scaler.scale(out.loss).backward()
    scaler.unscale_(optimizer)
    scaler.step(optimizer)
    scaler.update()
    moved = [not torch.equal(p, old) for p, old in zip(parameters, before, strict=True)]
    if scale > 2.0**100:
        assert not any(moved)
        assert scaler.get_scale() == scale / 2
        return
    assert any(moved)
    for parameter, gradient in zip(parameters, expected, strict=True):
        if gradient is not None:
            largest = float(gradient.abs().max())
            torch.testing.assert_close(parameter.grad, gradient, rtol=0, atol=0.05 * largest + 1e-6)
