"""Projections that read one tensor: computed by one call, equal to each by itself, whatever is called and how."""

import copy
import gc
import sys
import threading
import time
import weakref

import peft
import pytest
import torch
from interpreted import KERNEL_DEVICE, KERNELS
from torch import nn
from torch.utils.checkpoint import checkpoint
from transformers import Qwen2Config, Qwen2ForCausalLM

from graphlora.tuner import shared_input
from graphlora.tuner.layer import GraphLoraLinear
from graphlora.tuner.shared_input import SharedInput

NAMES = ("q_proj", "k_proj", "v_proj")


@pytest.fixture
def products(monkeypatch):
    """How many projections each call computes."""
    sizes, inner = [], shared_input.lora_linears

    def counted(x, matrices, *rest):
        sizes.append(len(matrices))
        return inner(x, matrices, *rest)

    monkeypatch.setattr(shared_input, "lora_linears", counted)
    return sizes


def attention(model):
    return model.get_base_model().model.layers[0].self_attn


def projections(model):
    return [module for module in model.modules() if isinstance(module, GraphLoraLinear)]


def set_apart(model):
    for layer in projections(model):
        layer.shared_input = SharedInput([layer])
    return model


def assert_nothing_waits(model):
    for layer in projections(model):
        assert layer.shared_input._kept is None


def step(model, tokens):
    """Logits, and the gradients of everything that trains."""
    model.zero_grad()
    outputs = model(input_ids=tokens, labels=tokens)
    outputs.loss.backward()
    trained = {name: p.grad for name, p in model.named_parameters() if p.requires_grad}
    return outputs.logits, {name: grad for name, grad in trained.items() if grad is not None}


def rows(requires_grad=True):
    return torch.randn(3, 5, 32, generator=torch.Generator().manual_seed(4), requires_grad=requires_grad)


def test_the_first_of_q_k_v_computes_all_of_them(make_adapted, tokens, products):
    model = make_adapted().train()
    step(model, tokens)
    assert products == [3, 1, 3, 1]  # the output projection has an input of its own
    assert_nothing_waits(model)


@pytest.mark.parametrize("training", [True, False])
def test_together_and_apart_agree(make_adapted, tokens, products, training):
    together, apart = make_adapted().train(training), set_apart(make_adapted()).train(training)
    (logits, grads), (other_logits, other_grads) = step(together, tokens), step(apart, tokens)
    assert products == [3, 1] * 2 + [1] * 8
    torch.testing.assert_close(logits, other_logits, rtol=1e-5, atol=1e-5)
    assert grads.keys() == other_grads.keys()
    for name, grad in grads.items():
        torch.testing.assert_close(grad, other_grads[name], rtol=1e-4, atol=1e-6, msg=name)


def test_together_and_apart_agree_beside_biases_that_only_some_have(make_config, tokens, products):
    def build():
        torch.manual_seed(0)
        sizes = {"vocab_size": 64, "hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 1}
        base = Qwen2ForCausalLM(Qwen2Config(**sizes, num_attention_heads=4, num_key_value_heads=2))
        for name, parameter in base.named_parameters():
            if name.endswith("bias"):
                nn.init.normal_(parameter)
        base.model.layers[0].self_attn.k_proj.bias = None
        model = peft.get_peft_model(base, make_config()).train()
        for layer in projections(model):
            nn.init.normal_(layer.graphlora_attention["default"].lora_B, std=0.1)
        return model

    (logits, grads), (other_logits, other_grads) = step(build(), tokens), step(set_apart(build()), tokens)
    assert products == [3, 1, 1, 1, 1, 1]
    torch.testing.assert_close(logits, other_logits, rtol=1e-5, atol=1e-5)
    for name, grad in grads.items():
        torch.testing.assert_close(grad, other_grads[name], rtol=1e-4, atol=1e-6, msg=name)


def test_a_projection_gives_the_same_alone_in_any_order_and_again(make_adapted):
    model = make_adapted().train()
    layers = [getattr(attention(model), name) for name in NAMES]
    x, other = rows(), rows().mul(2)
    alone = set_apart(make_adapted()).train()
    expected = {name: getattr(attention(alone), name)(x) for name in NAMES}
    expected_other = {name: getattr(attention(alone), name)(other) for name in NAMES}
    query, key, value = layers
    torch.testing.assert_close(value(x), expected["v_proj"])
    torch.testing.assert_close(value(x), expected["v_proj"])  # was collected: computed again
    torch.testing.assert_close(query(x), expected["q_proj"])
    torch.testing.assert_close(key(other), expected_other["k_proj"])  # what waits belongs to another tensor
    torch.testing.assert_close(key(x), expected["k_proj"])
    torch.testing.assert_close(query(x), expected["q_proj"])
    torch.testing.assert_close(value(x), expected["v_proj"])


def test_what_was_written_to_the_input_since_is_seen(make_adapted):
    model, alone = make_adapted().train(), set_apart(make_adapted()).train()
    x = rows(requires_grad=False)
    attention(model).q_proj(x)
    x.mul_(2)
    torch.testing.assert_close(attention(model).k_proj(x), attention(alone).k_proj(x))


def test_threads_may_call_one_model_at_once(make_adapted):
    """Each thread calls q, k and v with its own tensor, while the others exchange what waits."""
    model = make_adapted().eval()
    layers = [getattr(attention(model), name) for name in NAMES]
    xs = [torch.full((1, 32), 1.0 + seed) for seed in range(4)]
    with torch.no_grad():
        expected = [[layer(x.clone()) for layer in layers] for x in xs]
    wrong, switching, end = [], sys.getswitchinterval(), time.monotonic() + 1

    def serve(x: torch.Tensor, rights: list[torch.Tensor]) -> None:
        with torch.no_grad():
            while time.monotonic() < end:
                for layer, right in zip(layers, rights, strict=True):
                    out = layer(x)
                    if not torch.allclose(out, right, atol=1e-4):
                        wrong.append((x, out, right))

    threads = [threading.Thread(target=serve, args=each) for each in zip(xs, expected, strict=True)]
    sys.setswitchinterval(1e-6)
    try:
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
    finally:
        sys.setswitchinterval(switching)
    assert not wrong


def test_outputs_that_nobody_uses_cost_no_gradient(make_adapted):
    model, alone = make_adapted().train(), set_apart(make_adapted()).train()
    for one in (model, alone):
        x = rows()
        attention(one).q_proj(x).sum().backward()
        pair = attention(one).q_proj.graphlora_attention["default"]
        one.found = (x.grad, pair.lora_A.grad, pair.lora_B.grad)
    for grad, expected in zip(model.found, alone.found, strict=True):
        torch.testing.assert_close(grad, expected)
    for name in NAMES[1:]:
        pair = getattr(attention(model), name).graphlora_attention["default"]
        assert pair.lora_B.grad is None or not pair.lora_B.grad.any()


def test_only_what_is_adapted_is_computed(make_adapted, tokens, products):
    model = make_adapted(attention_target_modules=["q_proj", "v_proj"]).train()
    step(model, tokens)
    assert products == [2, 2]
    assert_nothing_waits(model)


@pytest.mark.parametrize(
    ("changes", "expected"),
    [
        # PyTorch's own dropout comes before the product.
        ({"lora_dropout": 0.3}, []),
        # One factor scales all pairs.
        ({"alpha_pattern": {"k_proj": 64}}, [2, 1, 1] * 2),
        ({"rank_pattern": {"k_proj": 4}, "alpha_pattern": {"k_proj": 8}}, [3, 1] * 2),
    ],
    ids=["dropout", "scalings", "ranks"],
)
def test_what_cannot_be_shared_is_computed_alone(make_adapted, tokens, products, changes, expected):
    model = make_adapted(**changes).train()
    step(model, tokens)
    assert products == expected
    assert_nothing_waits(model)


def test_a_sibling_that_is_no_plain_matrix_or_has_another_dtype_is_left_out(make_adapted, products):
    model = make_adapted().train()
    attention(model).k_proj.base_layer.register_forward_hook(lambda *_: None)
    attention(model).v_proj.graphlora_attention.to(torch.float64)
    attention(model).q_proj(rows())
    assert products == [1]


@KERNELS
def test_kernels_drop_the_same_entries_for_all(make_adapted, tokens, products):
    model = make_adapted(lora_dropout=0.3, backend="triton").to(KERNEL_DEVICE).train()
    logits, _ = step(model, tokens.to(KERNEL_DEVICE))
    assert products == [3, 1, 3, 1]
    assert_nothing_waits(model)
    again, _ = step(model, tokens.to(KERNEL_DEVICE))
    assert not torch.equal(logits, again)  # others in every forward


def test_a_sibling_that_drops_entries_is_left_out(make_adapted, products):
    model = make_adapted(lora_dropout=0.3).train()
    attention(model).q_proj.eval()
    attention(model).q_proj(rows())
    assert products == [1]


def test_another_adapter_or_none_is_seen(make_adapted, make_config, tokens, products):
    model = make_adapted().train()
    model.add_adapter("other", make_config(attention_target_modules=["q_proj"]))
    model.set_adapter("other")
    step(model, tokens)
    assert products == [1, 1]
    products.clear()
    with model.disable_adapter():
        model(input_ids=tokens)
    assert products == []
    model.set_adapter("default")
    model.delete_adapter("other")
    step(model, tokens)
    assert products == [3, 1, 3, 1]


@pytest.mark.parametrize("reentrant", [True, False])
def test_checkpointing_recomputes_them_together(make_adapted, products, reentrant):
    model = make_adapted().train()
    query, key, value = (getattr(attention(model), name) for name in NAMES)

    def run(x):
        return torch.cat([query(x), key(x), value(x)], -1).pow(2).sum()

    x = rows()
    (expected,) = torch.autograd.grad(run(x), x)
    checkpoint(run, x, use_reentrant=reentrant).backward()
    torch.testing.assert_close(x.grad, expected, rtol=0, atol=0)
    assert products == [3, 3, 3]
    assert_nothing_waits(model)


def test_what_an_interrupted_forward_left_is_neither_copied_nor_used(make_adapted, tokens):
    model = make_adapted().train()
    expected, _ = step(model, tokens)

    def interrupt(*_):
        raise KeyboardInterrupt

    hook = attention(model).k_proj.register_forward_pre_hook(interrupt)
    with pytest.raises(KeyboardInterrupt):
        step(model, tokens)
    hook.remove()
    assert attention(model).q_proj.shared_input._kept
    twin = copy.deepcopy(model)
    assert_nothing_waits(twin)
    for one in (model, twin):
        assert torch.equal(step(one, tokens)[0], expected)
        assert_nothing_waits(one)


def test_a_copy_shares_among_its_own(make_adapted, tokens, products):
    model = copy.deepcopy(make_adapted()).train()
    assert attention(model).v_proj.shared_input.layers == [getattr(attention(model), name) for name in NAMES]
    step(model, tokens)
    assert products == [3, 1, 3, 1]


def test_replicas_of_data_parallel_compute_alone(make_adapted, products):
    """They share the object with the layers that they are copies of, from threads of their own."""
    model = make_adapted().train()
    layer = attention(model).q_proj
    replica = layer._replicate_for_data_parallel()
    x = rows()
    expected = layer(x)
    products.clear()
    attention(model).k_proj(x), attention(model).v_proj(x)
    torch.testing.assert_close(replica(x), expected)
    assert products == [1]
    assert_nothing_waits(model)


def test_unloaded_projections_are_freed_at_once(make_adapted):
    model = make_adapted()
    watched = weakref.ref(attention(model).q_proj)
    gc.collect()
    gc.disable()
    try:
        model.unload()
        assert watched() is None
    finally:
        gc.enable()


class CrossAttention(nn.Module):
    """Queries of one tensor, keys of another."""


def test_attention_that_reads_two_tensors_shares_nothing(make_adapted):
    model = make_adapted()
    for parent, attribute in ((CrossAttention(), {}), (nn.Module(), {"is_kv_shared_layer": True})):
        vars(parent).update(attribute)
        for name in NAMES:
            setattr(parent, name, copy.deepcopy(getattr(attention(model), name)))
        before = [getattr(parent, name).shared_input for name in NAMES]
        shared_input.share_input(parent, GraphLoraLinear)
        assert [getattr(parent, name).shared_input for name in NAMES] == before
