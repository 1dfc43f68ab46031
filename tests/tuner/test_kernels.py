"""A whole adapted model on the kernels: called directly or by the dispatcher, and under what users put around it."""

from functools import partial

import peft
import pytest
import torch
from host_reads import Calls
from interpreted import KERNEL_DEVICE, KERNELS
from torch.utils.checkpoint import CheckpointPolicy, checkpoint, create_selective_checkpoint_contexts
from transformers import Phi3Config, Phi3ForCausalLM

from graphlora.tuner.layer import GraphLoraLayer

pytestmark = KERNELS
OPERATIONS = {
    "dropped",
    "add_dropped_product",
    *(f"expert_mix_{part}" for part in ("prepare", "forward", "backward")),
    *(f"graph_route_{part}" for part in ("prepare", "project", "finish", "backward")),
    "routing_sums",
    "routing_sums_backward",
}


@pytest.fixture
def model(make_adapted):
    return make_adapted(backend="triton", lora_dropout=0.2).to(KERNEL_DEVICE).train()


@pytest.fixture
def tokens(tokens):
    return tokens.to(KERNEL_DEVICE)


def step(model, tokens):
    torch.manual_seed(5)
    outputs = model(input_ids=tokens, labels=tokens)
    outputs.loss.backward()
    grads = {name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None}
    model.zero_grad()
    return {"loss": outputs.loss.detach()} | grads


def test_the_dispatcher_changes_no_bit_and_sees_every_operation(model, tokens):
    direct = step(model, tokens)
    with Calls() as calls:
        dispatched = step(model, tokens)
    assert {name.split(".")[1] for name in calls.names if name.startswith("graphlora.")} == OPERATIONS
    assert direct.keys() == dispatched.keys()
    for name, value in direct.items():
        assert torch.equal(dispatched[name], value), name


def test_saved_tensors_are_read_once(model, tokens):
    """Each read of them runs the hooks of whoever keeps them: checkpointing computes again, offloading copies again."""
    counts = {"packed": 0, "unpacked": 0}

    def count(name, t):
        counts[name] += 1
        return t

    with torch.autograd.graph.saved_tensors_hooks(partial(count, "packed"), partial(count, "unpacked")):
        step(model, tokens)
    assert 0 < counts["unpacked"] <= counts["packed"]


@pytest.mark.parametrize("kept", ["graphlora", "aten::mm", "aten::addmm"])
def test_selective_checkpointing(model, kept):
    """Blocks computed again but for the products or operations that a policy keeps."""
    block = model.get_base_model().model.layers[0].mlp

    def policy(_, operation, *args, **kwargs):
        keeps = operation.name().startswith(kept)
        return CheckpointPolicy.MUST_SAVE if keeps else CheckpointPolicy.PREFER_RECOMPUTE

    def run(call):
        torch.manual_seed(1)
        x = torch.randn(6, 32, generator=torch.Generator().manual_seed(0))
        x = x.to(KERNEL_DEVICE).requires_grad_()
        out = call(x)
        out.square().sum().backward()
        return out.detach(), x.grad

    contexts = partial(create_selective_checkpoint_contexts, policy)
    expected = run(block)
    found = run(lambda x: checkpoint(block, x, use_reentrant=False, context_fn=contexts))
    for value, other in zip(found, expected, strict=True):
        torch.testing.assert_close(value, other, rtol=1e-6, atol=1e-6)


SIZES = (
    "vocab_size",
    "hidden_size",
    "intermediate_size",
    "num_hidden_layers",
    "num_attention_heads",
    "pad_token_id",
)


def phi3(llama):
    """Of Llama's sizes."""
    torch.manual_seed(0)
    return Phi3ForCausalLM(
        Phi3Config(**{name: getattr(llama.config, name) for name in SIZES}, eos_token_id=None)
    )


@pytest.mark.parametrize("lora_dropout", [0.0, 0.2])
def test_gate_and_up_in_one_weight(make_llama, make_config, fill_adapter, tokens, monkeypatch, lora_dropout):
    """As Phi-3 has them: one product does the work of two."""
    triton = pytest.importorskip("graphlora.ops.expert_ffn.triton")
    used, joined = [], triton.joined
    monkeypatch.setattr(triton, "joined", lambda *weights: used.append(joined(*weights)) or used[-1])
    results = []
    for backend in ("torch", "triton"):
        torch.manual_seed(2)
        config = make_config(backend=backend, lora_dropout=lora_dropout)
        model = peft.get_peft_model(phi3(make_llama()), config).to(KERNEL_DEVICE).train()
        fill_adapter(model)
        layers = [m for m in model.modules() if isinstance(m, GraphLoraLayer)]
        results.append(step(model, tokens))
    assert len(used) == 2 * len(layers)
    assert all(both is not None for both in used)
    if lora_dropout == 0.0:  # the two backends draw other masks
        for name, value in results[0].items():
            assert (results[1][name] - value).norm() <= 1e-4 * value.norm() + 1e-9, name
