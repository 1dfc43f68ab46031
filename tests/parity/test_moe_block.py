"""One adapted FFN block: output, routing, auxiliary loss and every gradient."""

import pytest
import torch
from torch import nn

from graphlora.tuner.auxiliary import auxiliary_loss
from graphlora.tuner.ffn import take_apart
from graphlora.tuner.layer import GraphLoraLayer
from graphlora.tuner.record import Recorder

PROJECTIONS = {"w1": "gate_proj", "w3": "up_proj", "w2": "down_proj"}
ADAPTER = "default"


class Ffn(nn.Module):
    def __init__(self, recorded):
        super().__init__()
        for short, name in PROJECTIONS.items():
            weight = recorded[f"weight.{short}"]
            linear = nn.Linear(weight.shape[1], weight.shape[0], bias=False)
            linear.weight = nn.Parameter(weight, requires_grad=False)
            self.add_module(name, linear)
        self.act_fn = nn.SiLU()

    def forward(self, x):
        return self.down_proj(self.act_fn(self.gate_proj(x)) * self.up_proj(x))


class Block:
    """The adapted block with recorded weights, after one recorded training forward."""

    def __init__(self, recorded, parity, backend):
        s = recorded.settings
        self.config = parity.released_config(
            num_experts=s.num_experts, top_k=s.top_k, r=s.r, lora_alpha=s.lora_alpha, edge_density=s.density_threshold,
            router_hidden_size=s.router_hidden_size, router_num_layers=s.router_num_layers, backend=backend,
        )  # fmt: skip
        recorder = Recorder()
        self.layer = GraphLoraLayer(take_apart(Ffn(recorded), "mlp"), "mlp", 0, "decoder", recorder)
        self.layer.update_layer(ADAPTER, self.config)
        self.layer.set_adapter([ADAPTER])
        self.router = self.layer.graphlora_router[ADAPTER]
        self.named = parity.set_router(self.router, recorded, "weight.router.")
        self.coordination = self.layer.graphlora_coordination[ADAPTER]
        self.experts = {w: getattr(self.layer, f"graphlora_{p}")[ADAPTER] for w, p in PROJECTIONS.items()}
        with torch.no_grad():
            for w, experts in self.experts.items():
                experts.lora_A.copy_(recorded[f"weight.{w}.lora_A"])
                experts.lora_B.copy_(recorded[f"weight.{w}.lora_B"])
            self.coordination.poisson_rate_bias.copy_(recorded["lambda"] - 1.5)
            self.coordination.normal_scale_bias.copy_(recorded["theta"][0] - s.num_experts / 2)
            self.coordination.cumulative_weights.copy_(recorded["count_before"])
        self.x = recorded["input"].clone().requires_grad_()
        recorder.open([self.layer], training=True)
        self.output = self.layer(self.x)
        self.record = recorder.close()
        self.routing = self.record.entries[0][1]

    def aux_loss(self):
        return auxiliary_loss(self.record, {"decoder": None}, ADAPTER, self.config)


@pytest.fixture(params=["n8_k2", "n8_k2_released_init", "n8_k3"])
def recorded(request, parity):
    return parity.read(f"moe_block_{request.param}.safetensors")


@pytest.fixture
def block(recorded, parity, backend):
    return Block(recorded, parity, backend)


def test_output_and_gradients(recorded, parity, block):
    parity.within(block.output, recorded["output"], parity.tolerance.logits)
    (block.output * recorded["grad_output"]).sum().backward()
    parity.gradient(block.x.grad, recorded["grad.input"])
    parity.router_gradients(block.router, block.named, recorded, "grad.router.")
    for name, experts in block.experts.items():
        parity.gradient(experts.lora_A.grad, recorded[f"grad.{name}.lora_A"])
        parity.gradient(experts.lora_B.grad, recorded[f"grad.{name}.lora_B"])


def test_routing(recorded, parity, block):
    parity.within(block.routing.router_logits, recorded["router_logits"], parity.tolerance.logits)
    parity.within(block.routing.router_probs, recorded["probs"], parity.tolerance.probs)
    assert torch.equal(block.routing.top_k_index, recorded["top_k_index"])
    parity.within(block.routing.top_k_weights, recorded["top_k_weights"], parity.tolerance.probs)


def test_auxiliary_loss_loads_and_gradients(recorded, parity, block):
    loss = block.aux_loss()
    parity.within(block.coordination.cumulative_weights, recorded["count_after"], parity.tolerance.counts)
    torch.testing.assert_close(loss.detach(), recorded["aux_loss"], rtol=parity.tolerance.losses, atol=0)
    loss.backward()
    parity.gradient(block.x.grad, recorded["grad_aux.input"])
    parity.router_gradients(block.router, block.named, recorded, "grad_aux.router.")
    parity.gradient(block.coordination.poisson_rate_bias.grad, recorded["grad_aux.lambda"])
    parity.gradient(block.coordination.normal_scale_bias.grad, recorded["grad_aux.theta"])
    assert all(experts.lora_A.grad is None for experts in block.experts.values())
