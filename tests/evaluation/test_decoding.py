"""A decoding step alone equals the same step of the model, can be repeated, and is the same when captured."""

import pytest
import torch
from tiny_llama import make_base, make_model, wake
from transformers import DynamicCache

from graphlora.errors import GraphLoraError
from graphlora.evaluation.decoding import captured_decode_step, decode_step
from graphlora.ops.backend import has_triton, interprets_triton


def expected_logits(model, step, context):
    """The step with a cache of another kind, holding the same keys and values."""
    cache = DynamicCache()
    for i, layer in enumerate(step.cache.layers):
        cache.update(layer.keys[:, :, :context].clone(), layer.values[:, :, :context].clone(), i)
    with torch.no_grad():
        return model(input_ids=step.input_ids, past_key_values=cache).logits


@pytest.mark.parametrize("adapted", [False, True])
@pytest.mark.parametrize(("batch", "context"), [(1, 9), (3, 20)])
def test_the_step_is_the_models(adapted, batch, context):
    model = (make_model() if adapted else make_base()).eval()
    step = decode_step(model, batch, context)
    logits = step().clone()
    assert logits.shape == (batch, 1, model.config.vocab_size)
    torch.testing.assert_close(logits, expected_logits(model, step, context), rtol=1e-5, atol=1e-5)
    for _ in range(3):
        assert torch.equal(step(), logits)
    assert int(step.cache.get_seq_length()) == context


def test_other_tokens_give_other_logits():
    model = make_model().eval()
    step = decode_step(model, 2, 5)
    first = step().clone()
    step.input_ids.copy_((step.input_ids + 1) % model.config.vocab_size)
    assert not torch.allclose(step(), first, atol=1e-3)


@pytest.mark.skipif(
    not has_triton() or not interprets_triton(), reason="no Triton, or its interpreter is off beside a GPU"
)
def test_the_kernels_take_the_step(monkeypatch):
    """On the CPU in Triton's interpreter."""
    from graphlora import moe_decode

    calls = []
    kept = moe_decode.mix
    monkeypatch.setattr(moe_decode, "mix", lambda *args: (calls.append(1), kept(*args))[1])
    steps = {}
    for backend in ("eager", "triton"):
        model = make_model(backend=backend).eval()
        steps[backend] = decode_step(model, 3, 4)().clone()
    torch.testing.assert_close(steps["eager"], steps["triton"], rtol=1e-4, atol=1e-4)
    assert len(calls) == 2 * model.config.num_hidden_layers


def test_capture_needs_cuda():
    with pytest.raises(GraphLoraError, match="CUDA device"):
        captured_decode_step(make_base(), 1, 4)


@pytest.mark.gpu
@pytest.mark.parametrize("batch", [1, 8, 64])
def test_the_captured_step_is_the_step(batch):
    base = make_base(hidden_size=256, intermediate_size=512, num_attention_heads=4, num_key_value_heads=2)
    model = make_model(base=base.to("cuda", torch.bfloat16)).eval()
    wake(model, 1)
    plain = decode_step(model, batch, 33)
    expected = plain().float()
    step = captured_decode_step(model, batch, 33)
    for _ in range(3):
        torch.testing.assert_close(step().float(), expected, rtol=2e-2, atol=2e-2)
    step.input_ids.copy_((step.input_ids + 1) % model.config.vocab_size)
    plain.input_ids.copy_(step.input_ids)
    torch.testing.assert_close(step().float(), plain().float(), rtol=2e-2, atol=2e-2)
