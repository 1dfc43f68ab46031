"""The adapted model at work: outputs, generation, precision, checkpointing, other heads, other homes."""

import copy

import peft
import pytest
import torch
from accelerate import dispatch_model
from peft import PeftModel, prepare_model_for_kbit_training
from transformers import (
    Gemma3Config,
    Gemma3ForConditionalGeneration,
    LlamaConfig,
    LlamaForSequenceClassification,
    LlavaConfig,
    LlavaForConditionalGeneration,
    T5Config,
    T5ForConditionalGeneration,
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
FLOAT32_STATE = (
    "adjacency",
    "cumulative_weights",
    "logit_offset",
    "logit_mean",
    "num_updates",
    "_bias",
    "edge_logits",
)


@torch.no_grad()
def logits(model, tokens, **kwargs):
    return model(input_ids=tokens, **kwargs).logits


def grads(model):
    return {name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None}


def adapter_state(model):
    return {name: t for name, t in model.state_dict().items() if "graphlora_" in name}


# --- outputs ---------------------------------------------------------------------------------------------------------


def test_outputs_carry_the_auxiliary_loss_and_the_router_logits(make_adapted, tokens):
    model = make_adapted()
    outputs = model(input_ids=tokens, labels=tokens)
    assert outputs.aux_loss.shape == ()
    assert outputs.aux_loss.dtype == torch.float32
    assert [tuple(x.shape) for x in outputs.router_logits] == [(30, 4), (30, 4)]
    model.train()
    trained = model(input_ids=tokens, labels=tokens)
    # In training the loss contains the auxiliary loss, in evaluation it does not.
    torch.testing.assert_close(trained.loss - trained.aux_loss, outputs.loss, rtol=1e-5, atol=1e-5)


def test_tuples_work_too(make_adapted, tokens):
    model = make_adapted()
    outputs = model(input_ids=tokens, labels=tokens, return_dict=False)
    assert isinstance(outputs, tuple)
    torch.testing.assert_close(outputs[0], model(input_ids=tokens, labels=tokens).loss)


def test_evaluation_is_deterministic_with_dropout_configured(make_adapted, tokens):
    model = make_adapted(lora_dropout=0.5)
    assert torch.equal(logits(model, tokens), logits(model, tokens))
    state = copy.deepcopy(adapter_state(model))
    model.train()
    one, two = logits(model, tokens), logits(model, tokens)
    assert not torch.allclose(one, two, atol=1e-4)
    # Without gradients nothing is optimized, so nothing is counted.
    assert all(torch.equal(value, state[name]) for name, value in adapter_state(model).items())


@pytest.mark.parametrize("granularity", ["ffn", "linear"])
def test_backends_agree_in_a_whole_model(make_llama, make_config, fill_adapter, tokens, granularity):
    results = []
    for backend in ("eager", "torch"):
        torch.manual_seed(1)
        config = make_config(backend=backend, lora_dropout=0.3, expert_granularity=granularity)
        model = peft.get_peft_model(make_llama(), config)
        fill_adapter(model)
        model.train()
        torch.manual_seed(2)
        outputs = model(input_ids=tokens, labels=tokens)
        outputs.loss.backward()
        results.append({"loss": outputs.loss.detach(), **grads(model)})
    for name, value in results[0].items():
        torch.testing.assert_close(results[1][name], value, rtol=1e-5, atol=1e-5, msg=name)


def test_inputs_embeds_equal_input_ids(make_adapted, tokens):
    model = make_adapted()
    embeds = model.get_input_embeddings()(tokens).detach()
    outputs = model(inputs_embeds=embeds, labels=tokens)
    assert torch.equal(outputs.logits, logits(model, tokens))
    model.train()
    loss = model(inputs_embeds=embeds, attention_mask=torch.ones_like(tokens), labels=tokens).loss
    loss.backward()
    assert len(grads(model)) == sum(p.requires_grad for p in model.parameters())


# --- generation ------------------------------------------------------------------------------------------------------


def generate(model, tokens, **kwargs):
    options = {"max_new_tokens": 6, "min_new_tokens": 6, "do_sample": False, "pad_token_id": 0, **kwargs}
    return model.generate(input_ids=tokens, **options)


def test_generation_with_the_cache_equals_without(make_adapted, make_llama, tokens):
    model = make_adapted()
    state = copy.deepcopy(adapter_state(model))
    cached = generate(model, tokens)
    assert torch.equal(cached, generate(model, tokens, use_cache=False))
    assert all(torch.equal(value, state[name]) for name, value in adapter_state(model).items())
    with model.disable_adapter():
        base = generate(model, tokens)
    assert torch.equal(base, generate(make_llama(), tokens))
    assert not torch.equal(base, cached)
    positional = model.generate(tokens, max_new_tokens=6, min_new_tokens=6, do_sample=False, pad_token_id=0)
    assert torch.equal(positional, cached)


def test_left_padding_changes_no_answer(make_adapted, tokens):
    model = make_adapted()
    short = tokens[:1, -6:]
    padded = torch.cat([torch.zeros(1, 4, dtype=torch.long), short], dim=1)
    batch, mask = torch.cat([padded, tokens[1:2]]), torch.ones(2, 10, dtype=torch.long)
    mask[0, :4] = 0
    together = generate(model, batch, attention_mask=mask)
    alone = generate(model, short, attention_mask=torch.ones_like(short))
    assert torch.equal(together[0, 10:], alone[0, 6:])
    assert torch.equal(together[1], generate(model, tokens[1:2])[0])
    assert torch.equal(together, generate(model, batch, attention_mask=mask, use_cache=False))


@pytest.mark.parametrize("options", [{"num_beams": 2}, {"do_sample": True, "num_return_sequences": 2}])
def test_other_decodings_run(make_adapted, tokens, options):
    torch.manual_seed(0)
    assert generate(make_adapted(), tokens, **options).shape[1] == 16


def test_scores_carry_no_surprise(make_adapted, tokens):
    outputs = generate(make_adapted(), tokens, return_dict_in_generate=True, output_scores=True)
    assert len(outputs.scores) == 6


# --- precision -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
@pytest.mark.parametrize("autocast_adapter_dtype", [True, False])
def test_half_precision_bases(make_llama, make_config, fill_adapter, tokens, dtype, autocast_adapter_dtype):
    base = make_llama().to(dtype)
    expected = logits(base, tokens)
    model = peft.get_peft_model(base, make_config(), autocast_adapter_dtype=autocast_adapter_dtype).eval()
    assert model.dtype == dtype
    found = logits(model, tokens)
    assert found.dtype == dtype
    torch.testing.assert_close(found, expected, rtol=0, atol=0.02 * float(expected.abs().max()))
    for name, parameter in model.named_parameters():
        if "graphlora_" in name:
            kept = autocast_adapter_dtype or name.endswith(FLOAT32_STATE)
            assert parameter.dtype == (torch.float32 if kept else dtype), name
    fill_adapter(model)
    model.train()
    outputs = model(input_ids=tokens, labels=tokens)
    outputs.loss.backward()
    assert outputs.aux_loss.dtype == torch.float32
    assert all(grad.isfinite().all() for grad in grads(model).values())


@pytest.mark.parametrize(
    "cast", [lambda m: m.half(), lambda m: m.to(torch.bfloat16)], ids=["half", "to_bfloat16"]
)
@pytest.mark.parametrize("edge_init", ["random", "learned"])
def test_state_stays_float32_when_the_model_is_cast(make_adapted, tokens, cast, edge_init):
    model = make_adapted(edge_init=edge_init)
    model.train()(input_ids=tokens, labels=tokens)
    before = {name: t.clone() for name, t in adapter_state(model).items() if name.endswith(FLOAT32_STATE)}
    assert len(before) >= 12
    after = adapter_state(cast(model))
    for name, value in before.items():
        assert after[name].dtype == torch.float32, name
        assert torch.equal(after[name], value), name
    assert any(t.dtype != torch.float32 for t in after.values())
    logits(model.eval(), tokens)


def test_autocast_on_the_cpu(make_adapted, tokens):
    model = make_adapted()
    exact = logits(model, tokens)
    model.train()
    with torch.autocast("cpu", dtype=torch.bfloat16):
        outputs = model(input_ids=tokens, labels=tokens)
    outputs.loss.backward()
    assert outputs.aux_loss.dtype == torch.float32
    assert all(grad.dtype == torch.float32 and grad.isfinite().all() for grad in grads(model).values())
    # A rounding may send a token to another expert; nearly all tokens stay where they were.
    error = (outputs.logits.float() - exact).abs().amax(dim=-1) / exact.abs().max()
    assert (error < 0.05).float().mean() >= 0.9


# --- activation checkpointing ----------------------------------------------------------------------------------------


def checkpointed(model, use_reentrant):
    model.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": use_reentrant})
    return model.train()


@pytest.mark.parametrize("lora_dropout", [0.0, 0.3])
def test_checkpointing_changes_no_gradient_and_no_load(make_adapted, tokens, lora_dropout):
    results = []
    for on in (False, True):
        torch.manual_seed(1)
        model = make_adapted(lora_dropout=lora_dropout).train()
        if on:
            model.enable_input_require_grads()
            checkpointed(model, use_reentrant=False)
        torch.manual_seed(2)
        for _ in range(2):
            model(input_ids=tokens, labels=tokens).loss.backward()
        buffers = {name: t for name, t in model.named_buffers() if "graphlora_" in name}
        results.append(grads(model) | buffers)
    assert results[0].keys() == results[1].keys()
    for name, value in results[0].items():
        torch.testing.assert_close(results[1][name], value, rtol=1e-6, atol=1e-7, msg=name)


def test_reentrant_checkpointing_is_refused_with_the_remedy(make_adapted, tokens):
    model = checkpointed(make_adapted(), use_reentrant=True)
    model.enable_input_require_grads()
    with pytest.raises(GraphLoraError, match=r'Reentrant activation checkpointing.*"use_reentrant": False'):
        model(input_ids=tokens, labels=tokens)


def test_inputs_can_require_gradients(make_llama, make_config, tokens):
    base = make_llama()
    base.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": False})
    model = peft.get_peft_model(base, make_config()).train()
    assert model.get_input_embeddings()(tokens).requires_grad
    model(input_ids=tokens, labels=tokens).loss.backward()
    assert grads(model)


def test_prepared_for_kbit_training(make_llama, make_config, tokens):
    base = make_llama().to(torch.bfloat16)
    base.is_loaded_in_8bit = True
    base = prepare_model_for_kbit_training(base, gradient_checkpointing_kwargs={"use_reentrant": False})
    model = peft.get_peft_model(base, make_config()).train()
    model(input_ids=tokens, labels=tokens).loss.backward()
    trainable = {name for name, p in model.named_parameters() if p.requires_grad}
    assert trainable == set(grads(model))
    assert all("graphlora_" in name for name in trainable)


# --- other heads and homes -------------------------------------------------------------------------------------------


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
    assert torch.equal(logits(dispatched, tokens), expected)
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


def test_traced_model_runs(make_llama, make_config, fill_adapter, tokens):
    """`torch.compile` with the tracer alone, which needs no C++ compiler."""
    model = peft.get_peft_model(make_llama(num_hidden_layers=1), make_config()).eval()
    fill_adapter(model)
    expected = logits(model, tokens)
    torch.testing.assert_close(logits(torch.compile(model, backend="eager"), tokens), expected)


def test_float32_down_projection_beside_half_precision(make_config):
    """T5 keeps `wo` in float32 because what it gives may not fit float16."""
    torch.manual_seed(0)
    config = T5Config(
        vocab_size=64, d_model=32, d_ff=48, d_kv=8, num_layers=1, num_heads=4, decoder_start_token_id=0
    )
    base = T5ForConditionalGeneration(config).half().eval()
    for block in (base.encoder.block[0].layer[1], base.decoder.block[0].layer[2]):
        block.DenseReluDense.wo.float().weight.data.mul_(1e7)
    x = torch.randn(2, 5, 32, generator=torch.Generator().manual_seed(0)).half()
    expected = base.encoder.block[0].layer[1].DenseReluDense(x)
    assert expected.dtype == torch.float32
    assert expected.abs().max() > torch.finfo(torch.float16).max
    for backend in ("eager", "torch"):
        for granularity in ("ffn", "linear"):
            config = make_config(task_type="SEQ_2_SEQ_LM", backend=backend, expert_granularity=granularity)
            model = peft.get_peft_model(base, config).eval()
            found = base.encoder.block[0].layer[1].DenseReluDense(x)
            assert found.dtype == torch.float32
            torch.testing.assert_close(found, expected, rtol=2e-3, atol=2e-3 * expected.abs().max().item())
            model.unload()
