"""Several adapters, switching, deleting, disabling, and the verbs that are refused."""

import copy
import gc
import pickle
import weakref

import peft
import pytest
import torch
from peft import PeftModel

from graphlora.errors import GraphLoraError
from graphlora.tuner.layer import GraphLoraLayer, GraphLoraLinear


@torch.no_grad()
def logits(model, tokens):
    return model(input_ids=tokens).logits


@pytest.fixture
def pair(make_adapted, make_config, fill_adapter):
    """A model with adapters "default" (4 experts, r 2) and "wide" (6 experts, r 3)."""
    model = make_adapted()
    model.add_adapter("wide", make_config(num_experts=6, top_k=3, r=3))
    fill_adapter(model, "wide", seed=5)
    return model.eval()


def test_only_the_adapter_trains(make_adapted):
    model = make_adapted(fill=False)
    trainable = {name for name, p in model.named_parameters() if p.requires_grad}
    assert trainable == {name for name, _ in model.named_parameters() if "graphlora_" in name}
    assert {name.rpartition("default.")[2] for name in trainable} == {
        "lora_A", "lora_B", "token_proj", "expert_features", "conv_weight", "self_weight", "out_proj",
        "poisson_rate_bias", "normal_scale_bias",
    }  # fmt: skip
    count, total = model.get_nb_trainable_parameters()
    assert 0 < count < total


def test_switching_gives_each_adapters_outputs(pair, make_llama, tokens):
    base = logits(make_llama(), tokens)
    first = logits(pair, tokens)
    pair.set_adapter("wide")
    second = logits(pair, tokens)
    assert (first - second).abs().max() > 1e-3
    assert (second - base).abs().max() > 1e-3
    assert pair.base_model.model.model.layers[0].mlp.router("wide").num_experts == 6
    assert [len(x[0]) for x in pair(input_ids=tokens).router_logits] == [6, 6]
    pair.set_adapter("default")
    assert torch.equal(logits(pair, tokens), first)


def test_only_the_active_adapter_trains_and_counts(pair, tokens):
    loads = {name: pair.base_model.routing_stats(name) for name in ("default", "wide")}
    pair.set_adapter("wide")
    trainable = [name for name, p in pair.named_parameters() if p.requires_grad]
    assert trainable
    assert all(".wide." in name for name in trainable)
    pair.train()
    pair(input_ids=tokens, labels=tokens).loss.backward()
    assert pair.base_model.routing_stats("default") == loads["default"]
    assert pair.base_model.routing_stats("wide") != loads["wide"]


def test_load_adapter_adds_a_second_one(pair, make_adapted, tokens, tmp_path):
    pair.save_pretrained(tmp_path)
    model = make_adapted(fill=False)
    result = model.load_adapter(tmp_path / "wide", adapter_name="again")
    assert not result.unexpected_keys
    assert model.active_adapter == "default"
    model.set_adapter("again")
    pair.set_adapter("wide")
    assert torch.equal(logits(model.eval(), tokens), logits(pair, tokens))


def test_adapters_may_adapt_different_layers(make_adapted, make_config, make_llama, fill_adapter, tokens):
    model = make_adapted(layers_to_transform=[0], attention_target_modules=[])
    model.add_adapter("top", make_config(layers_to_transform=[1], attention_target_modules=[]))
    fill_adapter(model, "top")
    model.eval()
    assert len(model(input_ids=tokens).router_logits) == 1
    assert list(model.base_model.routing_stats("default")) == ["model.layers.0.mlp"]
    assert list(model.base_model.routing_stats("top")) == ["model.layers.1.mlp"]
    first = logits(model, tokens)
    model.set_adapter("top")
    assert not torch.equal(logits(model, tokens), first)
    with model.disable_adapter():
        assert torch.equal(logits(model, tokens), logits(make_llama(), tokens))


def test_delete_an_inactive_an_active_and_the_last_adapter(pair, make_config, make_llama, tokens):
    first = logits(pair, tokens)
    pair.delete_adapter("wide")
    assert list(pair.peft_config) == ["default"]
    assert not any("wide" in name for name in pair.state_dict())
    assert torch.equal(logits(pair, tokens), first)
    pair.add_adapter("third", make_config())
    pair.set_adapter("third")
    with pytest.warns(UserWarning, match="third"):
        pair.delete_adapter("third")
    assert pair.active_adapters == ["default"]
    assert torch.equal(logits(pair, tokens), first)
    pair.delete_adapter("default")
    assert not any("graphlora_" in name for name in pair.state_dict())
    # PEFT's own wrapper asks for the configuration of an adapter that is gone; the tuner runs as the base model.
    tuner = pair.base_model
    assert torch.equal(logits(tuner, tokens), logits(make_llama(), tokens))
    assert tuner.train()(input_ids=tokens, labels=tokens).loss.isfinite()


def test_deleting_what_is_not_there(pair):
    with pytest.raises(ValueError, match="nothing does not exist"):
        pair.delete_adapter("nothing")


def test_disabled_adapter_is_the_base_model(pair, make_llama, tokens):
    base = logits(make_llama(), tokens)
    adapted = logits(pair, tokens)
    with pair.disable_adapter():
        outputs = pair(input_ids=tokens, labels=tokens)
        assert torch.equal(outputs.logits, base)
        assert outputs.aux_loss == 0
        assert outputs.router_logits is None
    assert torch.equal(logits(pair, tokens), adapted)


def test_disabled_adapter_counts_nothing_in_training(pair, tokens):
    before = pair.base_model.routing_stats()
    with pair.disable_adapter():
        pair.train()(input_ids=tokens, labels=tokens)
    assert pair.base_model.routing_stats() == before


def test_several_active_adapters_are_refused(pair):
    with pytest.raises(GraphLoraError, match=r"one adapter at a time, got \['default', 'wide'\]"):
        pair.base_model.set_adapter(["default", "wide"])


REFUSED = {
    "merge_adapter": lambda model: model.merge_adapter(),
    "merge_and_unload": lambda model: model.merge_and_unload(),
    "safe_merge": lambda model: model.merge_and_unload(safe_merge=True),
    "layer_merge": lambda model: model.base_model.model.model.layers[0].mlp.merge(),
    "attention_merge": lambda model: model.base_model.model.model.layers[0].self_attn.q_proj.merge(),
}


@pytest.mark.parametrize("verb", REFUSED)
def test_merging_is_refused_and_changes_nothing(pair, tokens, verb):
    before = logits(pair, tokens)
    with pytest.raises(GraphLoraError, match=r"cannot be merged.*unload\(\)"):
        REFUSED[verb](pair)
    assert torch.equal(logits(pair, tokens), before)


def test_weighted_sums_are_refused(pair):
    with pytest.raises(GraphLoraError, match="cannot be combined by weights"):
        pair.add_weighted_adapter(["default", "wide"], [0.5, 0.5], "sum")


@pytest.mark.parametrize("names", [["default", "wide", "wide"], ["default"] * 3], ids=["mixed", "same"])
def test_mixed_batches_are_refused(pair, tokens, names):
    with pytest.raises(GraphLoraError, match=r"adapter_names=.*set_adapter\(NAME\)"):
        pair(input_ids=tokens, adapter_names=names)
    with pytest.raises(GraphLoraError, match=r"adapter_names=.*set_adapter\(NAME\)"):
        pair.generate(input_ids=tokens, adapter_names=names, max_new_tokens=1)
    pair(input_ids=tokens)


def test_unload_leaves_no_trace(pair, make_llama, tokens):
    reference = make_llama()
    model = pair.unload()
    assert type(model) is type(reference)
    assert list(model.state_dict()) == list(reference.state_dict())
    assert model.config.to_dict() == reference.config.to_dict()
    assert model.config.__dict__.keys() == reference.config.__dict__.keys()
    assert not model._forward_hooks
    assert not model._forward_pre_hooks
    assert not any(isinstance(m, (GraphLoraLayer, GraphLoraLinear)) for m in model.modules())
    assert not hasattr(model, "peft_config")
    outputs = model.train()(input_ids=tokens, labels=tokens)
    assert "aux_loss" not in outputs


def test_unloaded_model_can_be_adapted_again(make_adapted, make_config, tokens, make_llama):
    model = peft.get_peft_model(make_adapted().unload(), make_config(num_experts=3)).eval()
    torch.testing.assert_close(logits(model, tokens), logits(make_llama(), tokens), rtol=1e-6, atol=1e-6)
    assert len(model(input_ids=tokens).router_logits) == 2


def test_a_deep_copy_is_independent(pair, tokens):
    other = copy.deepcopy(pair)
    before = logits(pair, tokens)
    assert torch.equal(logits(other, tokens), before)
    other.train()
    outputs = other(input_ids=tokens, labels=tokens)
    assert outputs.aux_loss.item() > 0
    outputs.loss.backward()
    optimizer = torch.optim.SGD([p for p in other.parameters() if p.requires_grad], lr=1.0)
    optimizer.step()
    stats = pair.base_model.routing_stats()
    assert torch.equal(logits(pair, tokens), before)
    assert other.base_model.routing_stats() != stats
    base = other.unload()
    assert not base._forward_hooks
    assert pair.base_model.model._forward_hooks
    assert torch.equal(logits(pair, tokens), before)


def test_a_model_and_its_outputs_can_be_pickled(pair, tokens):
    other = pickle.loads(pickle.dumps(pair))
    assert torch.equal(logits(other, tokens), logits(pair, tokens))
    outputs = pickle.loads(pickle.dumps(pair(input_ids=tokens)))
    assert len(outputs.router_logits) == 2


def test_modules_to_save_switch_with_the_adapter(make_adapted, make_config, tokens):
    model = make_adapted(fill=False, modules_to_save=["lm_head"])
    with torch.no_grad():
        model.base_model.model.lm_head.modules_to_save["default"].weight.add_(1.0)
    model.add_adapter("plain", make_config())
    first = logits(model, tokens)
    model.set_adapter("plain")
    assert (logits(model, tokens) - first).abs().max() > 1e-3


def test_exclude_and_layer_choices(make_adapted):
    def adapted(**changes):
        model = make_adapted(fill=False, **changes)
        kinds = (GraphLoraLayer, GraphLoraLinear)
        return {m.block_name for m in model.modules() if isinstance(m, kinds)}

    blocks = {"model.layers.0.mlp", "model.layers.1.mlp"}
    no_attention = {"attention_target_modules": []}
    assert adapted(**no_attention) == blocks
    assert adapted(exclude_modules=["layers.0.mlp"], **no_attention) == {"model.layers.1.mlp"}
    assert adapted(exclude_modules=r".*layers\.1\..*", **no_attention) == {"model.layers.0.mlp"}
    assert adapted(exclude_modules=["q_proj", "k_proj", "o_proj"]) == blocks | {
        f"model.layers.{i}.self_attn.v_proj" for i in (0, 1)
    }
    assert adapted(layers_to_transform=1) == {"model.layers.1.mlp"} | {
        f"model.layers.1.self_attn.{p}_proj" for p in "qkvo"
    }
    assert adapted(layers_to_transform=[0], layers_pattern="layers", **no_attention) == {"model.layers.0.mlp"}
    assert adapted(target_modules=r".*\.0\.mlp", attention_target_modules=r".*\.1\..*q_proj") == {
        "model.layers.0.mlp",
        "model.layers.1.self_attn.q_proj",
    }
    assert adapted(target_modules=["model.layers.1.mlp"], attention_target_modules=["v_proj"]) == {
        "model.layers.1.mlp",
        "model.layers.0.self_attn.v_proj",
        "model.layers.1.self_attn.v_proj",
    }


def test_patterns_change_single_blocks(make_adapted, make_llama, tokens, tmp_path):
    model = make_adapted(
        num_experts_pattern={"layers.1.mlp": 7},
        rank_pattern={r"layers\.0\..*q_proj": 5, "layers.0.mlp": 3},
        alpha_pattern={"layers.0.mlp": 12},
    )
    low, high = (model.base_model.model.model.layers[i] for i in (0, 1))
    assert low.mlp.graphlora_up_proj["default"].lora_A.shape == (4, 3, 32)
    assert high.mlp.graphlora_up_proj["default"].lora_A.shape == (7, 2, 32)
    assert low.self_attn.q_proj.graphlora_attention["default"].lora_A.shape == (5, 32)
    assert high.self_attn.q_proj.graphlora_attention["default"].lora_A.shape == (2, 32)
    assert (low.mlp.scaling["default"], high.mlp.scaling["default"]) == (4.0, 2.0)
    outputs = model.train()(input_ids=tokens, labels=tokens)
    outputs.loss.backward()
    model.eval().save_pretrained(tmp_path)
    loaded = PeftModel.from_pretrained(make_llama(), tmp_path).eval()
    assert torch.equal(logits(loaded, tokens), logits(model, tokens))


def test_nothing_keeps_an_unloaded_adapter_alive(make_adapted):
    model = make_adapted()
    router = weakref.ref(model.base_model.model.model.layers[0].mlp.router("default"))
    base = model.unload()
    del model
    gc.collect()
    assert router() is None
    assert base is not None
