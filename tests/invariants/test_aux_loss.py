"""`outputs.aux_loss` is the weighted sum of the losses of the paper, and enters the loss exactly once, in training."""

import pytest
import torch
from tiny_llama import (
    adapter_state,
    assert_same,
    aux_by_hand,
    gradients,
    loads,
    make_base,
    make_batch,
    make_model,
)

from graphlora.losses import switch_balance

BATCH = make_batch([7, 3, 5])
KEEP = BATCH["attention_mask"].flatten()
CLOSE = {"rtol": 1e-5, "atol": 1e-6}


def language_model_loss(logits, labels=BATCH["labels"]):
    return torch.nn.functional.cross_entropy(logits[:, :-1].flatten(0, 1), labels[:, 1:].flatten())


@pytest.mark.parametrize(
    "config",
    [
        {},
        {"load_window": "cumulative"},
        {"router_self_term": "residual"},
        {"load_window": "batch", "num_experts": 6, "top_k": 3},
        {"preset": "paper", "edges": [[0, 1], [1, 2]]},
        {"router_type": "linear", "expert_granularity": "linear"},
        {"router_poisson_loss_coef": 0.0},
        {"router_normal_loss_coef": 0.0},
    ],
    ids=str,
)
def test_equals_the_formulas(config):
    model = make_model(**config)
    for seed in range(2):
        model(**make_batch([4, 6], seed=seed))
    history = loads(model)
    out = model(**BATCH)
    torch.testing.assert_close(out.aux_loss, aux_by_hand(model, out.router_logits, KEEP, history), **CLOSE)
    assert all(logits.shape == (BATCH["input_ids"].numel(), logits.shape[1]) for logits in out.router_logits)


def test_gradient_equals_that_of_the_formulas():
    def grads(by_hand):
        model = make_model()
        history = loads(model)
        out = model(**BATCH)
        loss = aux_by_hand(model, out.router_logits, KEEP, history) if by_hand else out.aux_loss
        loss.backward()
        return gradients(model)

    assert_same(grads(True), grads(False), 1e-5)


def test_learned_edges_add_their_penalty():
    model = make_model(
        edge_init="learned",
        router_poisson_loss_coef=0.0,
        router_normal_loss_coef=0.0,
        edge_density_loss_coef=2.0,
    )
    gates = [p for n, p in model.named_parameters() if "edge_logits" in n]
    expected = 2.0 * torch.stack([(torch.sigmoid(g).mean() - 0.5) ** 2 for g in gates]).mean()
    torch.testing.assert_close(model(**BATCH).aux_loss, expected, **CLOSE)


def test_enters_the_loss_once_in_training():
    out = make_model()(**BATCH)
    torch.testing.assert_close(out.loss, language_model_loss(out.logits) + out.aux_loss, **CLOSE)
    assert out.aux_loss > 0.01
    as_tuple = make_model()(**BATCH, return_dict=False)
    torch.testing.assert_close(as_tuple[0], out.loss)


@pytest.mark.parametrize("grad", [True, False])
def test_stays_out_of_the_loss_in_evaluation(grad):
    model = make_model().eval()
    with torch.set_grad_enabled(grad):
        out = model(**BATCH)
        torch.testing.assert_close(out.loss, language_model_loss(out.logits), **CLOSE)
        torch.testing.assert_close(model(**BATCH, return_dict=False)[0], out.loss)
    assert out.aux_loss > 0.01


def test_zero_coefficients_give_a_zero_tensor():
    out = make_model(router_poisson_loss_coef=0.0, router_normal_loss_coef=0.0)(**BATCH)
    assert isinstance(out.aux_loss, torch.Tensor) and out.aux_loss == 0
    torch.testing.assert_close(out.loss, language_model_loss(out.logits), **CLOSE)


def test_a_disabled_adapter_gives_zero_and_the_base_models_loss():
    model, base = make_model(), make_base().train()
    with model.disable_adapter():
        out = model(**BATCH)
    assert isinstance(out.aux_loss, torch.Tensor) and out.aux_loss == 0
    assert out.router_logits is None
    torch.testing.assert_close(out.loss, base(**BATCH).loss, rtol=0, atol=0)


def test_a_trainer_can_switch_it_off():
    """As TRL does: `output_router_logits` of the text config."""
    model = make_model()
    model.get_base_model().config.output_router_logits = False
    out = model(**BATCH)
    assert out.aux_loss == 0 and not out.aux_loss.requires_grad
    torch.testing.assert_close(out.loss, language_model_loss(out.logits), **CLOSE)
    assert loads(model).sum() > 0


def test_decoding_with_a_cache_gives_zero():
    model = make_model().eval()
    with torch.no_grad():
        first = model(**BATCH, use_cache=True)
        step = model(input_ids=BATCH["input_ids"][:, :1], past_key_values=first.past_key_values)
    assert first.aux_loss > 0.01
    assert step.aux_loss == 0


@pytest.mark.parametrize("share", [1.0, 0.25])
def test_micro_batch_takes_its_share_of_the_labels(share):
    labels = int((BATCH["labels"][:, 1:] != -100).sum())
    out = make_model()(**BATCH, num_items_in_batch=torch.tensor(labels / share))
    expected = share * (language_model_loss(out.logits) + out.aux_loss)
    torch.testing.assert_close(out.loss, expected, **CLOSE)


def test_unload_leaves_no_trace_in_the_base_config():
    fresh = make_base().config.to_dict()
    model = make_model()
    assert model.get_base_model().config.to_dict() != fresh
    assert model.unload().config.to_dict() == fresh


def test_state_that_training_needs_is_saved(tmp_path):
    model = make_model()
    optimizer = torch.optim.SGD([p for p in model.parameters() if p.requires_grad], lr=0.1)
    for _ in range(3):
        model(**BATCH).loss.backward()
        optimizer.step()
    model.save_pretrained(tmp_path)
    from peft import PeftModel

    loaded = PeftModel.from_pretrained(make_base(), tmp_path, is_trainable=True)
    before, after = adapter_state(model), adapter_state(loaded)
    assert before.keys() == after.keys()
    for name, value in before.items():
        assert torch.equal(value, after[name]), name
    for part in (
        "cumulative_weights",
        "adjacency",
        "logit_offset",
        "logit_sum",
        "poisson_rate",
        "normal_scale",
    ):
        assert any(part in name for name in before), part


def test_the_switch_form_enters_weighted_and_without_padding():
    coefficients = {
        "router_poisson_loss_coef": 0.0,
        "router_normal_loss_coef": 0.0,
        "router_aux_loss_coef": 0.01,
    }
    model, batch = make_model(router_type="linear", **coefficients), make_batch([6, 3])
    out = model(**batch)
    keep = batch["attention_mask"].flatten().bool()
    expected = []
    for logits in out.router_logits:
        probs = logits.softmax(dim=-1)
        expected.append(switch_balance(probs[keep], probs.topk(2).indices[keep]))
    torch.testing.assert_close(out.aux_loss, 0.01 * torch.stack(expected).mean())
