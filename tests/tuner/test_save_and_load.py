"""Adapter files: what is in them, and every way to load them."""

import json
from pathlib import Path

import peft
import pytest
import torch
from peft import AutoPeftModelForCausalLM, PeftConfig, PeftModel
from safetensors.torch import load_file

from graphlora.errors import GraphLoraError
from graphlora.tuner.layer import GraphLoraLayer

ADAPTER = "adapter_model.safetensors"


@torch.no_grad()
def logits(model, tokens):
    return model(input_ids=tokens).logits


def train_a_little(model, tokens, steps=3):
    model.train()
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=1e-2)
    for _ in range(steps):
        model(input_ids=tokens, labels=tokens).loss.backward()
        optimizer.step()
        optimizer.zero_grad()
    return model.eval()


def test_file_holds_the_adapter_alone_without_its_name(make_adapted, tmp_path):
    model = make_adapted()
    model.save_pretrained(tmp_path)
    assert {path.name for path in tmp_path.iterdir()} == {"README.md", "adapter_config.json", ADAPTER}
    saved = load_file(tmp_path / ADAPTER)
    assert all("graphlora_" in key and "default" not in key for key in saved)
    trained = sum(p.numel() for p in model.parameters() if p.requires_grad)
    buffers = sum(b.numel() for name, b in model.named_buffers() if "graphlora_" in name)
    assert sum(t.numel() for t in saved.values()) == trained + buffers
    block = "base_model.model.model.layers.0.mlp."
    assert saved[block + "graphlora_up_proj.lora_A"].shape == (4, 2, 32)
    assert saved[block + "graphlora_router.adjacency"].shape == (4, 4)
    assert json.loads((tmp_path / "adapter_config.json").read_text())["peft_type"] == "GRAPHLORA"


@pytest.mark.parametrize("preset", ["graphlora", "paper", "released"])
@pytest.mark.parametrize("low_cpu_mem_usage", [False, True])
@pytest.mark.filterwarnings("ignore:.*expert graphs hold twins:UserWarning")
def test_trained_adapter_and_its_state_survive(
    make_adapted, make_llama, tokens, tmp_path, preset, low_cpu_mem_usage
):
    model = train_a_little(make_adapted(preset=preset), tokens)
    model.save_pretrained(tmp_path)
    loaded = PeftModel.from_pretrained(
        make_llama(), tmp_path, adapter_name="again", low_cpu_mem_usage=low_cpu_mem_usage
    )
    # Weights that were loaded in place of empty ones lie elsewhere in memory, which changes the last bit of a product.
    torch.testing.assert_close(logits(loaded.eval(), tokens), logits(model, tokens), rtol=1e-6, atol=1e-6)
    assert loaded.base_model.routing_stats() == model.base_model.routing_stats()
    before = {k: v for k, v in model.state_dict().items() if "graphlora_" in k}
    after = {k.replace(".again", ".default"): v for k, v in loaded.state_dict().items() if "graphlora_" in k}
    assert before.keys() == after.keys()
    for name, value in before.items():
        assert torch.equal(after[name], value), name
        assert not value.is_meta


def test_learned_edges_survive(make_adapted, make_llama, tokens, tmp_path):
    model = train_a_little(make_adapted(edge_init="learned"), tokens)
    model.save_pretrained(tmp_path)
    loaded = PeftModel.from_pretrained(make_llama(), tmp_path).eval()
    assert torch.equal(logits(loaded, tokens), logits(model, tokens))


def test_similarity_graph_is_not_rebuilt_from_trained_weights(make_adapted, make_llama, tmp_path):
    model = make_adapted(edge_init="similarity", edge_density=0.5, expert_features="projected")
    layer = model.base_model.model.model.layers[0].mlp
    graph = layer.router("default").adjacency.clone()
    with torch.no_grad():
        layer.router("default").expert_proj.normal_(generator=torch.Generator().manual_seed(0))
    model.save_pretrained(tmp_path)
    loaded = PeftModel.from_pretrained(make_llama(), tmp_path)
    assert torch.equal(loaded.base_model.model.model.layers[0].mlp.router("default").adjacency, graph)


@pytest.mark.parametrize("is_trainable", [False, True])
def test_loaded_adapter_trains_only_where_asked(make_adapted, make_llama, tmp_path, is_trainable):
    make_adapted().save_pretrained(tmp_path)
    loaded = PeftModel.from_pretrained(make_llama(), tmp_path, is_trainable=is_trainable)
    trainable = [name for name, p in loaded.named_parameters() if p.requires_grad]
    assert bool(trainable) == is_trainable
    assert all("graphlora_" in name for name in trainable)


def test_auto_class_loads_base_and_adapter_from_directories(
    make_llama, make_config, fill_adapter, tokens, tmp_path
):
    make_llama().save_pretrained(tmp_path / "base")
    base = type(make_llama()).from_pretrained(tmp_path / "base")
    model = peft.get_peft_model(base, make_config()).eval()
    fill_adapter(model)
    model.save_pretrained(tmp_path / "adapter")
    loaded = AutoPeftModelForCausalLM.from_pretrained(tmp_path / "adapter")
    assert torch.equal(logits(loaded.eval(), tokens), logits(model, tokens))
    config = PeftConfig.from_pretrained(tmp_path / "adapter")
    assert config.inference_mode
    assert config.base_model_name_or_path == str(tmp_path / "base")


def test_pickled_weights_are_refused(make_adapted, make_llama, tmp_path):
    make_adapted().save_pretrained(tmp_path, safe_serialization=False)
    assert (tmp_path / "adapter_model.bin").is_file()
    with pytest.raises(GraphLoraError, match=r"adapter_model\.bin, a pickle file, which is not read"):
        PeftModel.from_pretrained(make_llama(), tmp_path)


def test_selected_adapters_get_folders_of_their_own(make_adapted, make_config, tmp_path):
    model = make_adapted()
    model.add_adapter("wide", make_config(num_experts=6, r=3))
    model.save_pretrained(tmp_path / "one", selected_adapters=["wide"])
    assert [p.name for p in (tmp_path / "one").iterdir() if p.is_dir()] == ["wide"]
    assert not (tmp_path / "one" / ADAPTER).exists()
    model.save_pretrained(tmp_path / "both")
    assert (tmp_path / "both" / ADAPTER).is_file()
    assert (tmp_path / "both" / "wide" / ADAPTER).is_file()
    with pytest.raises(ValueError, match="narrow"):
        model.save_pretrained(tmp_path / "none", selected_adapters=["narrow"])


def test_adapter_weights_can_be_set_on_another_model(make_adapted, tokens):
    one, two = make_adapted(), make_adapted(fill=False)
    result = peft.set_peft_model_state_dict(two, peft.get_peft_model_state_dict(one))
    assert not result.unexpected_keys
    assert torch.equal(logits(one, tokens), logits(two, tokens))


def test_a_file_of_other_sizes_is_refused(make_adapted, make_llama, tmp_path):
    make_adapted().save_pretrained(tmp_path)
    with pytest.raises(RuntimeError, match="size mismatch"):
        PeftModel.from_pretrained(make_llama(hidden_size=48), tmp_path)


def test_modules_to_save_are_in_the_file(make_adapted, make_llama, tokens, tmp_path):
    model = train_a_little(make_adapted(modules_to_save=["lm_head"]), tokens)
    model.save_pretrained(tmp_path)
    assert "base_model.model.lm_head.weight" in load_file(tmp_path / ADAPTER)
    loaded = PeftModel.from_pretrained(make_llama(), tmp_path, adapter_name="x").eval()
    assert torch.equal(logits(loaded, tokens), logits(model, tokens))
    assert not torch.equal(loaded.base_model.model.lm_head.weight, make_llama().lm_head.weight)


def test_resized_vocabulary_is_saved_with_the_adapter(make_llama, make_config, tmp_path):
    make_llama().save_pretrained(tmp_path / "base")

    def resized():
        torch.manual_seed(7)
        model = type(make_llama()).from_pretrained(tmp_path / "base")
        model.resize_token_embeddings(70, mean_resizing=False)
        return model

    model = peft.get_peft_model(resized(), make_config(modules_to_save=["embed_tokens", "lm_head"]))
    tokens = torch.randint(64, 70, (2, 6), generator=torch.Generator().manual_seed(0))
    train_a_little(model, tokens)
    with pytest.warns(UserWarning, match="Setting `save_embedding_layers` to `True`"):
        model.save_pretrained(tmp_path / "adapter")
    torch.manual_seed(99)
    loaded = PeftModel.from_pretrained(resized(), tmp_path / "adapter").eval()
    assert torch.equal(logits(loaded, tokens), logits(model, tokens))


def test_no_layer_is_lost_where_names_repeat(make_adapted, tmp_path):
    """Saved under one name, loaded under a name that is part of other keys."""
    make_adapted().save_pretrained(tmp_path)
    base = make_adapted().unload()
    loaded = PeftModel.from_pretrained(base, tmp_path, adapter_name="mlp")
    layers = [m for m in loaded.modules() if isinstance(m, GraphLoraLayer)]
    assert all(list(layer.graphlora_up_proj) == ["mlp"] for layer in layers)
    loaded.save_pretrained(tmp_path / "out")
    saved = load_file(Path(tmp_path) / "out" / "mlp" / ADAPTER)
    original = load_file(tmp_path / ADAPTER)
    assert saved.keys() == original.keys()
    assert all(torch.equal(saved[key], original[key]) for key in saved)
