"""Half precision, autocast, activation checkpointing and preparation for k-bit training."""

import peft
import pytest
import torch
from interpreted import KERNEL_DEVICE, KERNELS
from peft import prepare_model_for_kbit_training
from transformers import T5Config, T5ForConditionalGeneration

from graphlora.errors import GraphLoraError

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


def checkpointed(model, use_reentrant):
    model.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": use_reentrant})
    return model.train()


@pytest.mark.parametrize("lora_dropout", [0.0, 0.3])
@pytest.mark.parametrize("backend", ["eager", "torch", pytest.param("triton", marks=KERNELS)])
def test_checkpointing_changes_no_gradient_and_no_load(make_adapted, tokens, backend, lora_dropout):
    device = KERNEL_DEVICE if backend == "triton" else "cpu"
    tokens = tokens.to(device)
    results = []
    for on in (False, True):
        torch.manual_seed(1)
        model = make_adapted(backend=backend, lora_dropout=lora_dropout).to(device).train()
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
