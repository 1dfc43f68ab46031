"""The auxiliary loss reaches the optimizer exactly once under an unmodified transformers.Trainer and a plain loop."""

import pytest
import torch
from tiny_llama import adapter_state, assert_same, largest_gap, layers, make_model
from tiny_trainers import arguments, by_hand, make_rows, pad, router_part, run_trainer
from transformers import Trainer, TrainingArguments

EQUAL, UNEQUAL = [6] * 16, [6, 3, 9, 4, 7, 2, 5, 8, 3, 3, 6, 9, 4, 5, 8, 7]


@pytest.mark.parametrize("collator", ["padding", "packing"])
@pytest.mark.parametrize("accumulation", [1, 4])
def test_gradients_are_those_of_the_loss_written_out(tmp_path, accumulation, collator):
    steps, batches, _ = run_trainer(tmp_path, UNEQUAL, accumulation, collator)
    assert ("attention_mask" in batches[0]) == (collator == "padding")
    expected = by_hand(batches, accumulation, "labels")
    assert len(steps) == len(expected) == 2
    for ours, theirs in zip(steps, expected, strict=True):
        assert_same(router_part(theirs), router_part(ours), 1e-5)
        assert_same(theirs, ours, 1e-5)
        assert all(
            g.abs().max() > 1e-6 for n, g in ours.items() if n.endswith(("poisson_rate_bias", "scale_bias"))
        )


def test_a_doubled_or_missing_auxiliary_loss_would_be_seen(tmp_path):
    steps, batches, _ = run_trainer(tmp_path, UNEQUAL, 4)
    for factor in (0.0, 2.0):
        wrong = by_hand(
            batches, 4, "labels", router_poisson_loss_coef=0.3 * factor, router_normal_loss_coef=0.7 * factor
        )[0]
        right = {n: g for n, g in router_part(steps[0]).items() if n in wrong}
        assert largest_gap(right, {n: wrong[n] for n in right}) > 0.1


@pytest.mark.parametrize("packing", ["padding", "packing"])
def test_poisson_part_is_the_same_for_accumulation_1_and_4(tmp_path, packing):
    config = {"router_normal_loss_coef": 0.0}
    once, four = (run_trainer(tmp_path, EQUAL, n, packing, config)[0] for n in (1, 4))
    for ours, theirs in zip(once, four, strict=True):
        assert_same(ours, theirs, 1e-5)


def test_normal_part_keeps_its_coefficient(tmp_path):
    """It is not linear in the batch; docs/masks.md has the measurement."""
    gaps = {}
    for window in ("ema", "cumulative", "batch"):
        config = {"router_poisson_loss_coef": 0.0, "load_window": window}
        once, four = (router_part(run_trainer(tmp_path, EQUAL, n, config=config)[0][0]) for n in (1, 4))
        norms = [torch.cat([g.flatten() for g in grads.values()]).norm() for grads in (once, four)]
        assert 0.4 < norms[1] / norms[0] < 2.5
        gaps[window] = largest_gap(once, four)
    assert 1e-3 < gaps["batch"] < 1.0


def test_a_plain_loop_needs_nothing_but_the_loss():
    """Averaging over accumulation steps is then the loop's own business, as for any model."""
    rows = make_rows(EQUAL[:8])
    model = make_model()
    for part in (rows[:4], rows[4:]):
        (model(**pad(part)).loss / 2).backward()
    ours = {n: p.grad for n, p in model.named_parameters() if p.grad is not None}
    assert_same(by_hand([pad(rows[:4]), pad(rows[4:])], 2, "labels")[0], ours, 1e-5)


def test_checkpoint_and_resume_go_on_exactly(tmp_path):
    """Weights, loads, graph and centering, bit for bit."""
    options = {"max_steps": 4, "save_strategy": "steps", "save_steps": 2, "optim": "adamw_torch"}
    _, _, whole = run_trainer(tmp_path / "whole", UNEQUAL, 2, **options)
    model = make_model(seed=5, base=make_model().unload())
    trainer = Trainer(
        model,
        TrainingArguments(
            **arguments(
                tmp_path / "whole", per_device_train_batch_size=4, gradient_accumulation_steps=2, **options
            )
        ),
        data_collator=pad,
        train_dataset=make_rows(UNEQUAL),
    )
    trainer.train(resume_from_checkpoint=str(tmp_path / "whole" / "checkpoint-2"))
    assert_same(adapter_state(whole), adapter_state(model), 0.0)
    assert all(layer.coordination("default").cumulative_weights.sum() > 0 for layer in layers(model))


def test_evaluation_reports_the_language_model_loss(tmp_path):
    model = make_model()
    trainer = Trainer(
        model,
        TrainingArguments(**arguments(tmp_path, per_device_eval_batch_size=4)),
        data_collator=pad,
        eval_dataset=make_rows(EQUAL[:8]),
    )
    before = adapter_state(model)
    reported = trainer.evaluate()["eval_loss"]
    with torch.no_grad():
        expected = model.eval()(**pad(make_rows(EQUAL[:8]))).loss
    assert reported == pytest.approx(expected.item(), rel=1e-5)
    assert_same(before, adapter_state(model), 0.0)
