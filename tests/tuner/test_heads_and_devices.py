"""Other heads than language modeling, text models inside larger ones, offloaded and spread-out models."""

import copy

import peft
import pytest
import torch
from accelerate import dispatch_model
from peft import PeftModel
from transformers import (
    Gemma3Config,
    Gemma3ForConditionalGeneration,
    LlamaConfig,
    LlamaForSequenceClassification,
    LlavaConfig,
    LlavaForConditionalGeneration,
)

from graphlora.errors import GraphLoraError
from graphlora.tuner.layer import GraphLoraLayer

TEXT = {
    "vocab_size": 64,
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 64,
}
VISION = {
    "hidden_size": 16,
    "intermediate_size": 24,
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
    "image_size": 8,
    "patch_size": 4,
}


@torch.no_grad()
def logits(model, tokens, **kwargs):
    return model(input_ids=tokens, **kwargs).logits


def grads(model):
    return {name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None}


def test_sequence_classification(make_config, tokens, tmp_path):
    def build():
        torch.manual_seed(0)
        return LlamaForSequenceClassification(LlamaConfig(**TEXT, num_labels=3, pad_token_id=0)).eval()

    model = peft.get_peft_model(build(), make_config(task_type="SEQ_CLS"))
    labels = torch.tensor([0, 1, 2])
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=1e-2)
    losses = []
    for _ in range(5):
        outputs = model.train()(input_ids=tokens, attention_mask=torch.ones_like(tokens), labels=labels)
        outputs.loss.backward()
        losses.append(outputs.loss.item() - outputs.aux_loss.item())
        assert model.base_model.model.score.modules_to_save["default"].weight.grad is not None
        optimizer.step()
        optimizer.zero_grad()
    assert losses[-1] < losses[0]
    model.eval().save_pretrained(tmp_path)
    loaded = PeftModel.from_pretrained(build(), tmp_path, adapter_name="other").eval()
    assert torch.equal(logits(loaded, tokens), logits(model, tokens))


def build_llava():
    return LlavaForConditionalGeneration(
        LlavaConfig(
            text_config={"model_type": "llama", **TEXT},
            vision_config={"model_type": "clip_vision_model", **VISION, "projection_dim": 16},
            image_token_index=63,
            vision_feature_layer=-1,
            image_seq_length=4,
        )
    )


def build_gemma3():
    return Gemma3ForConditionalGeneration(
        Gemma3Config(
            text_config={**TEXT, "head_dim": 8, "pad_token_id": 0},
            vision_config={**VISION, "model_type": "siglip_vision_model"},
            mm_tokens_per_image=4,
            image_token_index=63,
            boi_token_index=61,
            eoi_token_index=62,
        )
    )


@pytest.mark.parametrize("build", [build_llava, build_gemma3], ids=["llava", "gemma3"])
def test_text_model_inside_a_vision_language_model(make_config, fill_adapter, tmp_path, build):
    torch.manual_seed(0)
    base = build().eval()
    tokens = torch.randint(3, 60, (2, 10), generator=torch.Generator().manual_seed(0))
    tokens[:, 1:5] = 63
    inputs = {
        "input_ids": tokens,
        "attention_mask": torch.ones_like(tokens),
        "pixel_values": torch.randn(2, 3, 8, 8),
    }
    if build is build_gemma3:
        inputs["token_type_ids"] = (tokens == 63).long()
    with torch.no_grad():
        expected = base(**inputs).logits
    model = peft.get_peft_model(base, make_config()).eval()
    blocks = [m.block_name for m in model.modules() if isinstance(m, GraphLoraLayer)]
    assert len(blocks) == 2
    assert not any("vision" in name and "graphlora_" in name for name, _ in model.named_parameters())
    with torch.no_grad():
        torch.testing.assert_close(model(**inputs).logits, expected, rtol=1e-5, atol=1e-6)
    fill_adapter(model)
    outputs = model.train()(**inputs, labels=tokens.masked_fill(tokens == 63, -100))
    outputs.loss.backward()
    assert outputs.aux_loss.item() > 0
    assert set(grads(model)) == {name for name, p in model.named_parameters() if p.requires_grad}
    model.eval().save_pretrained(tmp_path)
    torch.manual_seed(0)
    loaded = PeftModel.from_pretrained(build().eval(), tmp_path, adapter_name="other")
    with torch.no_grad():
        assert torch.equal(loaded.eval()(**inputs).logits, model(**inputs).logits)


def test_blocks_offloaded_to_disk_answer_as_before(make_adapted, tokens, tmp_path):
    """Weights that lie elsewhere between the calls, as under a `device_map` with offloading."""
    model = make_adapted()
    expected = logits(model, tokens)
    homes = {"model.embed_tokens": "cpu", "model.rotary_emb": "cpu", "model.norm": "cpu", "lm_head": "cpu"}
    homes |= {"model.layers.0": "disk", "model.layers.1": "cpu"}
    device_map = {f"base_model.model.{name}": home for name, home in homes.items()}
    dispatched = dispatch_model(model, device_map, main_device="cpu", offload_dir=tmp_path, force_hooks=True)
    block = dispatched.base_model.model.model.layers[0].mlp
    assert block.base_layer.up_proj.weight.is_meta
    assert block.graphlora_up_proj["default"].lora_A.is_meta
    # Projections whose weights are fetched are computed one by one, which rounds otherwise.
    torch.testing.assert_close(logits(dispatched, tokens), expected, rtol=1e-5, atol=1e-6)
    assert dispatched(input_ids=tokens, labels=tokens).aux_loss == 0
    with pytest.raises(GraphLoraError, match=r"model.layers.0.mlp is offloaded.*device_map"):
        dispatched.train()(input_ids=tokens, labels=tokens)


@pytest.mark.parametrize(
    "devices",
    [
        pytest.param(("cpu", "cpu"), id="cpu"),
        pytest.param(
            (0, 1),
            id="two_gpus",
            marks=pytest.mark.skipif(torch.cuda.device_count() < 2, reason="needs two GPUs"),
        ),
    ],
)
def test_layers_spread_over_devices(make_adapted, tokens, devices):
    """A `device_map`: each block's state is where the block is, and the losses meet on the first one's device."""
    reference = make_adapted().train()
    expected = reference(input_ids=tokens, labels=tokens)
    expected.loss.backward()
    first, last = devices
    homes = {"model.embed_tokens": first, "model.rotary_emb": first, "model.layers.0": first}
    homes |= {"model.layers.1": last, "model.norm": last, "lm_head": last}
    device_map = {f"base_model.model.{name}": home for name, home in homes.items()}
    model = dispatch_model(make_adapted(), device_map, main_device=first, force_hooks=True).train()
    inputs = tokens.to(first)
    outputs = model(input_ids=inputs, labels=inputs)
    outputs.loss.backward()
    torch.testing.assert_close(outputs.loss.cpu(), expected.loss, rtol=1e-4, atol=1e-5)
    torch.testing.assert_close(outputs.aux_loss.cpu(), expected.aux_loss, rtol=1e-4, atol=1e-5)
    for name, grad in grads(reference).items():
        torch.testing.assert_close(grads(model)[name].cpu(), grad, rtol=1e-3, atol=1e-4, msg=name)
    found, stats = model.base_model.routing_stats(), reference.base_model.routing_stats()
    assert found["model.layers.1.mlp"]["expert_load"] == pytest.approx(
        stats["model.layers.1.mlp"]["expert_load"]
    )


def test_an_adapter_on_the_meta_device_gets_its_state_when_loaded(make_llama, make_adapted, tokens):
    reference = make_adapted()
    config = copy.deepcopy(reference.peft_config["default"])
    empty = peft.get_peft_model(make_llama(), config, low_cpu_mem_usage=True)
    assert any(p.is_meta for name, p in empty.named_parameters() if "graphlora_" in name)
    peft.set_peft_model_state_dict(empty, peft.get_peft_model_state_dict(reference), low_cpu_mem_usage=True)
    torch.testing.assert_close(logits(empty.eval(), tokens), logits(reference, tokens), rtol=1e-6, atol=1e-6)
