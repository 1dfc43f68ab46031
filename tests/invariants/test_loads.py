"""Loads change in training forwards only, once per token, whatever else a trainer does with the model."""

import pytest
import torch
from tiny_llama import (
    adapter_state,
    assert_same,
    gradients,
    layers,
    load_by_hand,
    loads,
    make_batch,
    make_model,
)

from graphlora.errors import GraphLoraError


def test_a_training_forward_counts_each_real_token_once():
    model, batch = make_model(load_window="cumulative"), make_batch([6, 3])
    out = model(**batch)
    keep = batch["attention_mask"].flatten()
    expected = torch.stack([load_by_hand(logits, keep, 2) for logits in out.router_logits]).detach()
    assert_same({"loads": expected}, {"loads": loads(model)}, 1e-5)
    assert torch.allclose(loads(model).sum(dim=1), torch.tensor(9.0))
    model(**batch)
    assert torch.allclose(loads(model).sum(dim=1), torch.tensor(18.0))


def test_ema_and_batch_windows():
    batch = make_batch([6, 3])
    cumulative, ema, single = (
        make_model(load_window=window, load_decay=0.75) for window in ("cumulative", "ema", "batch")
    )
    for model in (cumulative, ema, single):
        model(**batch)
    once = loads(cumulative)
    assert_same({"": 0.25 * once}, {"": loads(ema)}, 1e-6)
    for model in (ema, single):
        model(**batch)
    assert_same({"": 0.25 * (1 + 0.75) * once}, {"": loads(ema)}, 1e-6)
    assert_same({"": loads(ema)}, {"": loads(single)}, 1e-6)  # the batch window reports what the ema does


def evaluate(model, batch):
    model.eval()
    model(**batch)
    with torch.no_grad():
        model(**batch)


def no_grad_in_training_mode(model, batch):
    with torch.no_grad():
        model.train()(**batch)


def generate(model, batch):
    prompt = {name: batch[name] for name in ("input_ids", "attention_mask")}
    for mode in (False, True):
        for use_cache in (False, True):
            model.train(mode).generate(**prompt, max_new_tokens=3, do_sample=False, use_cache=use_cache)


def disabled(model, batch):
    with model.train().disable_adapter():
        model(**batch)


@pytest.mark.parametrize("act", [evaluate, no_grad_in_training_mode, generate, disabled])
def test_nothing_else_changes_any_state(act):
    model, batch = make_model(), make_batch([6, 3], side="left")
    model(**batch)
    before = adapter_state(model)
    act(model, batch)
    assert_same(before, adapter_state(model), 0.0)
    model.train()(**batch)
    assert not torch.equal(loads(model), torch.stack([before[n] for n in before if "cumulative" in n]))


def checkpoint_activations(model, use_reentrant=False):
    base = model.get_base_model()
    # Older versions of transformers have only the second name.
    enable = getattr(base, "activation_checkpointing_enable", None) or base.gradient_checkpointing_enable
    enable({"use_reentrant": use_reentrant})
    model.enable_input_require_grads()


def train(checkpointing: bool, steps: int = 4):
    model = make_model()
    if checkpointing:
        checkpoint_activations(model)
    optimizer = torch.optim.SGD([p for p in model.parameters() if p.requires_grad], lr=0.05)
    for step in range(steps):
        optimizer.zero_grad()
        model(**make_batch([6, 3], seed=step)).loss.backward()
        grads = gradients(model)
        optimizer.step()
    return grads, adapter_state(model)


def test_activation_checkpointing_changes_nothing():
    plain, checkpointed = train(False), train(True)
    assert_same(plain[0], checkpointed[0], 1e-6)
    assert_same(plain[1], checkpointed[1], 1e-6)
    offsets = [value for name, value in plain[1].items() if "logit_offset" in name]
    first = [value for name, value in adapter_state(make_model()).items() if "logit_offset" in name]
    assert not torch.equal(torch.stack(offsets), torch.stack(first)), "the centering must have moved"


def test_checkpointing_is_right_for_several_forwards_before_one_backward():
    def grads(checkpointing):
        model = make_model()
        if checkpointing:
            checkpoint_activations(model)
        losses = [model(**make_batch([6, 3], seed=seed)).loss for seed in range(3)]
        sum(losses).backward()
        return gradients(model)

    assert_same(grads(False), grads(True), 1e-6)


@pytest.mark.filterwarnings("ignore:None of the inputs have requires_grad:UserWarning")
def test_reentrant_checkpointing_is_refused():
    model = make_model()
    checkpoint_activations(model, use_reentrant=True)
    with pytest.raises(GraphLoraError, match="use_reentrant"):
        model(**make_batch([6, 3]))


def test_centering_moves_once_per_optimizer_step_by_all_its_tokens():
    def offsets(micro_batches):
        model = make_model()
        optimizer = torch.optim.SGD([p for p in model.parameters() if p.requires_grad], lr=0.0)
        for _ in range(3):
            for part in micro_batches:
                model(**part).loss.backward()
            optimizer.step()
        model(**micro_batches[0])
        return torch.stack([layer.router("default").logit_offset for layer in layers(model)])

    whole = make_batch([6, 4, 5, 2])
    parts = [{name: value[i : i + 1] for name, value in whole.items()} for i in range(4)]
    assert_same({"": offsets([whole])}, {"": offsets(parts)}, 1e-5)


def test_a_failed_forward_leaves_nothing_open():
    model, batch = make_model(), make_batch([6, 3])
    with pytest.raises((TypeError, AttributeError)):
        model(**batch, no_such_argument_of_attention=object(), position_ids="wrong")
    assert not model.base_model.recorder.is_open
    assert model.get_base_model().config.output_router_logits is True
    assert model(**batch).aux_loss > 0
