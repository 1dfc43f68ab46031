"""The auxiliary loss reaches the optimizer exactly once under an unmodified TRL SFTTrainer."""

import pytest
from datasets import Dataset
from tiny_llama import adapter_config, assert_same, loads, make_base
from tiny_trainers import arguments, by_hand, make_rows, make_tokenizer, router_part, run_sft
from trl import SFTConfig, SFTTrainer

UNEQUAL = [6, 3, 9, 4, 7, 2, 5, 8, 3, 3, 6, 9, 4, 5, 8, 7]
EQUAL = [6] * 16


def logged(trainer):
    return {name: value for row in trainer.state.log_history for name, value in row.items()}


def first_labels_off(batches):
    """A row's first token is no target of a causal model; packing says so, padding leaves it to the shift."""
    for batch in batches:
        batch["labels"][:, 0] = -100
    return batches


@pytest.mark.parametrize("accumulation", [1, 4])
@pytest.mark.parametrize("form", ["padding", "padding_free", "packing"])
def test_gradients_are_those_of_the_loss_written_out(tmp_path, accumulation, form):
    options = {
        "padding": {},
        "padding_free": {"padding_free": True, "max_length": None},
        "packing": {"packing": True, "packing_strategy": "bfd", "max_length": 12, "num_train_epochs": 9},
    }[form]
    if form == "packing":
        options["per_device_train_batch_size"] = 4 // accumulation
    steps, batches, trainer = run_sft(tmp_path, UNEQUAL, accumulation, **options)
    assert ("attention_mask" in batches[0]) == (form == "padding")
    expected = by_hand(first_labels_off(batches), accumulation, "steps")
    assert len(steps) == len(expected) == 2
    for ours, theirs in zip(steps, expected, strict=True):
        assert_same(router_part(theirs), router_part(ours), 1e-5)
        assert_same(theirs, ours, 1e-5)
    assert logged(trainer)["aux_loss"] > 0.01


def test_poisson_part_is_the_same_for_accumulation_1_and_4(tmp_path):
    config = {"router_normal_loss_coef": 0.0}
    once, four = (run_sft(tmp_path, EQUAL, n, config)[0] for n in (1, 4))
    for ours, theirs in zip(once, four, strict=True):
        assert_same(ours, theirs, 1e-5)


def test_coefficient_zero_switches_it_off(tmp_path):
    steps, batches, trainer = run_sft(tmp_path, UNEQUAL, router_aux_loss_coef=0.0)
    without = {"router_poisson_loss_coef": 0.0, "router_normal_loss_coef": 0.0}
    expected = by_hand(first_labels_off(batches), 1, "steps", **without)
    assert_same(expected[0], steps[0], 1e-5)
    assert not any(name.endswith(("poisson_rate_bias", "normal_scale_bias")) for name in steps[0])
    assert "aux_loss" not in logged(trainer)
    assert "mean_token_accuracy" in logged(trainer)
    assert loads(trainer.model).sum() > 0


def test_coefficient_two_doubles_it(tmp_path):
    steps, batches, _ = run_sft(tmp_path, UNEQUAL, router_aux_loss_coef=2.0)
    twice = {"router_poisson_loss_coef": 0.6, "router_normal_loss_coef": 1.4}
    assert_same(by_hand(first_labels_off(batches), 1, "steps", **twice)[0], steps[0], 1e-5)


def test_checkpointing_changes_nothing(tmp_path):
    plain, _, _ = run_sft(tmp_path, UNEQUAL)
    recomputed, _, _ = run_sft(tmp_path, UNEQUAL, gradient_checkpointing=True)
    for ours, theirs in zip(plain, recomputed, strict=True):
        assert_same(ours, theirs, 1e-6)


def test_as_peft_config_it_trains(tmp_path):
    trainer = SFTTrainer(
        make_base(),
        SFTConfig(**arguments(tmp_path, bf16=False, gradient_checkpointing=False)),
        train_dataset=Dataset.from_list(make_rows(EQUAL)),
        processing_class=make_tokenizer(),
        peft_config=adapter_config(),
    )
    trainer.train()
    assert loads(trainer.model).sum() > 0
    assert logged(trainer)["aux_loss"] > 0.01
