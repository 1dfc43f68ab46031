"""The adapted model at work: its outputs, and generation."""

import copy

import peft
import pytest
import torch
from transformers import GPT2Config, GPT2LMHeadModel

from graphlora.errors import GraphLoraError


@torch.no_grad()
def logits(model, tokens, **kwargs):
    return model(input_ids=tokens, **kwargs).logits


def grads(model):
    return {name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None}


def adapter_state(model):
    return {name: t for name, t in model.state_dict().items() if "graphlora_" in name}


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


@pytest.mark.skipif(torch.cuda.is_available(), reason="Triton's interpreter is off beside a GPU")
def test_kernels_are_refused_where_they_do_not_fit(make_llama, make_config, tokens):
    """With the reason; `"linear"` granularity has no kernels of its own and needs none."""
    gpt2 = GPT2LMHeadModel(GPT2Config(vocab_size=64, n_embd=16, n_layer=1, n_head=2, n_positions=16))
    for base, reason in (
        (gpt2, "FFN blocks without a gate"),
        (make_llama(hidden_act="mish"), "the activation MishActivation"),
    ):
        model = peft.get_peft_model(base, make_config(backend="triton"))
        with pytest.raises(GraphLoraError, match=f"do not support {reason}; use backend='auto'"):
            model(input_ids=tokens)
    model = peft.get_peft_model(make_llama(), make_config(backend="triton", top_k=4, num_experts=65))
    with pytest.raises(GraphLoraError, match="more than 64 experts"):
        model(input_ids=tokens)
    config = make_config(backend="triton", expert_granularity="linear", router_type="linear")
    assert peft.get_peft_model(make_llama(), config)(input_ids=tokens).logits.isfinite().all()


def test_inputs_embeds_equal_input_ids(make_adapted, tokens):
    model = make_adapted()
    embeds = model.get_input_embeddings()(tokens).detach()
    outputs = model(inputs_embeds=embeds, labels=tokens)
    assert torch.equal(outputs.logits, logits(model, tokens))
    model.train()
    loss = model(inputs_embeds=embeds, attention_mask=torch.ones_like(tokens), labels=tokens).loss
    loss.backward()
    assert len(grads(model)) == sum(p.requires_grad for p in model.parameters())


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


@pytest.mark.filterwarnings(
    "ignore:.*should not be instantiated:DeprecationWarning"
)  # PyTorch's own tracer does it
def test_traced_model_runs(make_llama, make_config, fill_adapter, tokens):
    """`torch.compile` with the tracer alone, which needs no C++ compiler."""
    model = peft.get_peft_model(make_llama(num_hidden_layers=1), make_config()).eval()
    fill_adapter(model)
    expected = logits(model, tokens)
    torch.testing.assert_close(logits(torch.compile(model, backend="eager"), tokens), expected)
