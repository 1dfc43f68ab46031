"""Quantized base models: the projections are called as modules, so the adapter never looks at their weights."""

import importlib.util

import peft
import pytest
import torch
from interpreted import INTERPRETED
from peft import PeftModel, prepare_model_for_kbit_training
from transformers import BitsAndBytesConfig, LlamaConfig, LlamaForCausalLM, TorchAoConfig

from graphlora.tuner.four_bits import keep_differentiable
from graphlora.tuner.layer import GraphLoraLayer

SIZES = {
    "vocab_size": 64,
    "hidden_size": 64,
    "intermediate_size": 128,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 64,
}


def torchao_int8():
    from torchao.quantization import Int8WeightOnlyConfig

    return TorchAoConfig(Int8WeightOnlyConfig())


def bitsandbytes_8bit():
    return BitsAndBytesConfig(load_in_8bit=True)


def bitsandbytes_4bit():
    return BitsAndBytesConfig(load_in_4bit=True, bnb_4bit_compute_dtype=torch.float32)


def needs(library):
    missing = importlib.util.find_spec(library) is None
    return pytest.mark.skipif(missing, reason=f"{library} is not installed (graphlora[quantization])")


KINDS = [
    pytest.param(torchao_int8, marks=needs("torchao"), id="torchao_int8"),
    pytest.param(bitsandbytes_8bit, marks=needs("bitsandbytes"), id="bitsandbytes_8bit"),
    pytest.param(bitsandbytes_4bit, marks=needs("bitsandbytes"), id="bitsandbytes_4bit"),
]


@pytest.fixture(scope="module")
def base_directory(tmp_path_factory):
    torch.manual_seed(0)
    directory = tmp_path_factory.mktemp("base")
    LlamaForCausalLM(LlamaConfig(**SIZES)).save_pretrained(directory)
    return directory


@pytest.fixture(params=KINDS)
def load_base(request, base_directory):
    def load():
        base = LlamaForCausalLM.from_pretrained(
            base_directory, quantization_config=request.param(), device_map="cpu", dtype=torch.float32
        ).eval()
        # Some CPUs have another product for evaluation, with other rounding.
        keep_differentiable(base)
        return base

    return load


@torch.no_grad()
def logits(model, tokens):
    return model(input_ids=tokens).logits


def losses_of_training(model, tokens, steps=4):
    model.train()
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=1e-2)
    losses = []
    for _ in range(steps):
        outputs = model(input_ids=tokens, labels=tokens)
        outputs.loss.backward()
        losses.append(outputs.loss.item() - outputs.aux_loss.item())
        assert all(p.grad is not None for p in model.parameters() if p.requires_grad)
        optimizer.step()
        optimizer.zero_grad()
    model.eval()
    return losses


def test_quantized_base_starts_equal_trains_saves_and_loads(load_base, make_config, tokens, tmp_path):
    base = load_base()
    block = base.model.layers[0].mlp
    weight = block.up_proj.weight
    assert type(weight) is not torch.nn.Parameter or weight.dtype not in (torch.float32, torch.bfloat16)
    expected = logits(base, tokens)
    model = peft.get_peft_model(base, make_config()).eval()
    assert isinstance(base.model.layers[0].mlp, GraphLoraLayer)
    tolerance = 1e-6 * (1 + expected.abs().max().item())
    torch.testing.assert_close(logits(model, tokens), expected, rtol=1e-6, atol=tolerance)
    assert all(p.dtype == torch.float32 for name, p in model.named_parameters() if "graphlora_" in name)
    losses = losses_of_training(model, tokens)
    assert losses[-1] < losses[0]
    model.save_pretrained(tmp_path)
    loaded = PeftModel.from_pretrained(load_base(), tmp_path, adapter_name="other").eval()
    torch.testing.assert_close(logits(loaded, tokens), logits(model, tokens), rtol=1e-6, atol=1e-6)
    restored = model.unload()
    assert torch.equal(logits(restored, tokens), expected)


@needs("bitsandbytes")
def test_a_base_that_was_evaluated_in_four_bits_trains(base_directory, make_config, tokens):
    """On a CPU with AVX-512 and bfloat16, evaluation packs its weights for a product without a gradient."""
    base = LlamaForCausalLM.from_pretrained(
        base_directory, quantization_config=bitsandbytes_4bit(), device_map="cpu", dtype=torch.float32
    ).eval()
    layers = [module for module in base.modules() if type(module).__name__ == "Linear4bit"]
    packs = layers[0].support_avx512bf16_for_cpu
    expected = logits(base, tokens)
    packed = [getattr(layer.weight.quant_state, "packing_format_for_cpu", False) for layer in layers]
    assert packed == [packs] * len(layers)
    model = peft.get_peft_model(base, make_config()).eval()
    torch.testing.assert_close(logits(model, tokens), expected, rtol=0.05, atol=0.05)
    losses = losses_of_training(model, tokens)
    assert losses[-1] < losses[0]
    assert not any(getattr(layer.weight.quant_state, "packing_format_for_cpu", False) for layer in layers)


def test_prepared_quantized_base_trains_with_checkpointing(load_base, make_config, tokens):
    kwargs = {"use_reentrant": False}
    base = prepare_model_for_kbit_training(load_base(), gradient_checkpointing_kwargs=kwargs)
    losses = losses_of_training(peft.get_peft_model(base, make_config()), tokens)
    assert losses[-1] < losses[0]


@INTERPRETED
def test_the_kernels_on_a_quantized_base(load_base, make_config, fill_adapter, tokens):
    """They take the separate path there, beside the base's own calls: the gradients are those of the PyTorch path."""
    results = []
    for backend in ("torch", "triton"):
        torch.manual_seed(2)
        model = peft.get_peft_model(load_base(), make_config(backend=backend))
        fill_adapter(model)
        model.train()
        model(input_ids=tokens, labels=tokens).loss.backward()
        results.append({name: p.grad for name, p in model.named_parameters() if p.grad is not None})
    assert results[0].keys() == results[1].keys()
    assert results[0]
    for name, grad in results[0].items():
        torch.testing.assert_close(
            results[1][name], grad, rtol=1e-3, atol=1e-4 * float(grad.abs().max()), msg=name
        )


def test_generation_on_a_quantized_base(load_base, make_adapted, make_config, fill_adapter, tokens):
    model = peft.get_peft_model(load_base(), make_config()).eval()
    fill_adapter(model)
    options = {"max_new_tokens": 4, "min_new_tokens": 4, "do_sample": False, "pad_token_id": 0}
    with torch.no_grad():
        cached = model.generate(input_ids=tokens, **options)
        assert torch.equal(cached, model.generate(input_ids=tokens, use_cache=False, **options))
