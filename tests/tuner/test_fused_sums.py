"""The auxiliary loss with its sums from the kernel equals the PyTorch one: value, gradients, the state it leaves."""

import pytest
import torch

pytest.importorskip("triton")
from tiny_llama import layers, make_model

from graphlora.ops.backend import interprets_triton
from graphlora.router import select_experts
from graphlora.tuner import auxiliary
from graphlora.tuner.record import RoutingRecord

pytestmark = pytest.mark.skipif(not interprets_triton(), reason="TRITON_INTERPRET is not set")
SETTINGS = [
    {},
    {"preset": "released"},
    {"preset": "paper", "load_window": "ema", "router_aux_loss_coef": 0.01},
    {"num_experts_pattern": {"layers.1.mlp": 6}, "router_poisson_loss_coef": 0.0},
]


def loss_and_state(settings: dict, is_masked: bool, is_fused: bool, monkeypatch) -> dict[str, torch.Tensor]:
    monkeypatch.setattr(auxiliary, "_has_kernel", lambda *_: is_fused)
    model = make_model(**settings)
    generator = torch.Generator().manual_seed(3)
    record, leaves = RoutingRecord(training=True), []
    config = model.peft_config["default"]
    for layer in layers(model):
        size = layer.coordination("default").num_experts
        leaves.append((2 * torch.randn(40, size, generator=generator)).requires_grad_())
        record.entries.append((layer, select_experts(leaves[-1], config.top_k)))
    mask = torch.rand(40, generator=generator) > 0.3 if is_masked else None
    loss = auxiliary.auxiliary_loss(record, {"decoder": mask, "encoder": None}, "default", config)
    loss.backward()
    named = [*model.named_parameters(), *((f"logits {i}", leaf) for i, leaf in enumerate(leaves))]
    grads = {name: p.grad for name, p in named if p.grad is not None}
    assert any("poisson_rate_bias" in name for name in grads) == bool(config.router_poisson_loss_coef)
    return {"loss": loss.detach(), **grads, **dict(model.named_buffers())}


@pytest.mark.parametrize("is_masked", [True, False])
@pytest.mark.parametrize("settings", SETTINGS, ids=str)
@pytest.mark.filterwarnings("ignore:.*hold twins")
def test_the_kernel_changes_nothing(settings, is_masked, monkeypatch):
    found, expected = (loss_and_state(settings, is_masked, fused, monkeypatch) for fused in (True, False))
    assert found.keys() == expected.keys()
    for name, value in expected.items():
        torch.testing.assert_close(
            found[name], value, rtol=1e-6, atol=1e-6, msg=lambda t, n=name: f"{n}: {t}"
        )
