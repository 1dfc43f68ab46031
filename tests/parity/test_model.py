"""A whole model with an adapter of the authors, imported: logits, losses, routing and every gradient."""

import peft
import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM

from graphlora.tuner.import_authors import import_checkpoint

NUM_LAYERS, NUM_EXPERTS = 2, 8


@pytest.fixture(scope="module")
def recorded(parity):
    return parity.read("model_tiny/outputs.safetensors")


@pytest.fixture(params=["stored", "rebuilt"])
def graph(request):
    return request.param


@pytest.fixture
def model(recorded, parity, backend, graph, tmp_path):
    """The base with a fresh `preset="released"` adapter that took over the imported weights."""
    source, adapter, given = parity.data / "model_tiny" / "graphlora", tmp_path / "adapter", None
    if graph == "stored":
        given = tmp_path / "graph.safetensors"
        matrices = {name: recorded[f"stored.{name}"].clone() for name in adjacency_names()}
        save_file(matrices, given)
    import_checkpoint(source, adapter, graph=given)
    base = AutoModelForCausalLM.from_pretrained(parity.data / "model_tiny" / "base", dtype=torch.float32)
    config = parity.released_config(
        task_type="CAUSAL_LM",
        num_experts=NUM_EXPERTS,
        r=2,
        lora_alpha=4,
        router_hidden_size=32,
        backend=backend,
        edges=[],
    )
    model = peft.get_peft_model(base, config)
    loaded = peft.set_peft_model_state_dict(model, load_file(adapter / "adapter_model.safetensors"))
    assert not loaded.unexpected_keys
    assert not [name for name in loaded.missing_keys if "graphlora_" in name]
    return model


def adjacency_names():
    return [f"layers.{i}.adjacency" for i in range(NUM_LAYERS)]


def test_base_logits(recorded, parity):
    base = AutoModelForCausalLM.from_pretrained(parity.data / "model_tiny" / "base", dtype=torch.float32)
    parity.within(base(recorded["input_ids"]).logits, recorded["base_logits"], parity.tolerance.logits)


def test_graph_and_logits(recorded, parity, model, graph):
    stats = model.base_model.routing_stats()
    for name, block in zip(adjacency_names(), stats.values(), strict=True):
        expected = recorded[f"{graph}.{name}"][:-1, :-1].fill_diagonal_(0)
        assert torch.equal(torch.tensor(block["adjacency"]), expected)
    model.eval()
    with torch.no_grad():
        logits = model(recorded["input_ids"]).logits
    parity.within(logits, recorded[f"{graph}.logits"], parity.tolerance.logits)
    with model.disable_adapter(), torch.no_grad():
        base_logits = model(recorded["input_ids"]).logits
    parity.within(base_logits, recorded["base_logits"], parity.tolerance.logits)


def test_routing_and_counts(recorded, parity, model, graph):
    model.train()
    with model.base_model.record_routing() as routing:
        model(recorded["input_ids"])
    for i in range(NUM_LAYERS):
        name = f"{graph}.layers.{i}"
        block = routing[f"model.layers.{i}.mlp"]
        parity.within(block.router_probs, recorded[f"{name}.probs"], parity.tolerance.probs)
        assert torch.equal(block.top_k_index, recorded[f"{name}.top_k_index"])
        layer = model.get_submodule(f"base_model.model.model.layers.{i}.mlp")
        counts = layer.graphlora_coordination["default"].cumulative_weights
        parity.within(counts, recorded[f"{name}.count_after"], parity.tolerance.counts)


@pytest.mark.parametrize("graph", ["stored"])
def test_losses_and_gradients(recorded, parity, model, graph):
    model.train()
    outputs = model(recorded["input_ids"], labels=recorded["input_ids"])
    loss = outputs.loss - outputs.aux_loss
    for ours, name in ((loss, "lm_loss"), (outputs.aux_loss, "aux_loss")):
        torch.testing.assert_close(
            ours.detach(), recorded[f"{graph}.{name}"], rtol=parity.tolerance.losses, atol=0
        )
    outputs.loss.backward()
    gradients = parity.read("model_tiny/grads.safetensors")
    seen = {name: gradient_of(model, name) for name in gradients}
    for name, expected in gradients.items():
        parity.gradient(seen[name], expected)
    assert sum(g.numel() for g in seen.values()) == sum(
        p.numel() for p in model.parameters() if p.requires_grad
    )


def gradient_of(model, name):
    """Our gradient of a tensor under the authors' name, `mixlora.layers.{l}.{rest}`."""
    _, _, layer, *rest = name.split(".")
    block = model.get_submodule(f"base_model.model.model.layers.{layer}")
    match rest:
        case ["self_attn", projection, which, "weight"]:
            pair = block.self_attn.get_submodule(projection).graphlora_attention["default"]
            return getattr(pair, which).grad
        case ["experts", expert, projection, which, "weight"]:
            ours = {"w1_proj": "gate_proj", "w2_proj": "down_proj", "w3_proj": "up_proj"}[projection]
            stacked = getattr(block.mlp, f"graphlora_{ours}")["default"]
            return getattr(stacked, which).grad[int(expert)]
        case ["gate", "convs", conv, "lin", "weight"]:
            return block.mlp.graphlora_router["default"].conv_weight.grad[int(conv)]
        case ["gate", "lamb" | "theta" as symbol]:
            ours = {"lamb": "poisson_rate_bias", "theta": "normal_scale_bias"}[symbol]
            return getattr(block.mlp.graphlora_coordination["default"], ours).grad
        case ["gate", weight, "weight"]:
            ours = {"mlp": "token_proj", "mlp_struct": "expert_proj", "proj": "out_proj"}[weight]
            return getattr(block.mlp.graphlora_router["default"], ours).grad
    raise AssertionError(f"unknown tensor {name}")
