"""A run that is finished stays as it is, however it ended and wherever it was killed afterwards."""

import hashlib
import shutil
from dataclasses import replace
from pathlib import Path

import pytest
from transformers import TrainerState, trainer_utils

from graphlora.records import RunRecord
from graphlora.training import Recipe, train
from graphlora.training.run_data import load_data
from graphlora.training.trainer import AdapterTrainer

WEIGHTS = "adapter_model.safetensors"
LAST = {"eval_strategy": "no", "load_best_model_at_end": False, "save_steps": 2}
EXPERTS = {"method": "graphlora", "num_experts": 4, "router_hidden_size": 16}
ENDS = {
    "max_steps": {"max_steps": 4, **EXPERTS, **LAST},
    "best": {"max_steps": 4, "eval_steps": 2},
    "share": {"max_steps": 5, "eval_steps": 0.2, "gradient_accumulation_steps": 2},
    "epochs": {"max_steps": -1, "num_train_epochs": 1, **LAST},
    "part of an epoch": {"max_steps": -1, "num_train_epochs": 0.6, **LAST},
    "by epoch": {"max_steps": 11, "eval_strategy": "epoch"},
    "stopped early": {
        "max_steps": 20,
        "eval_steps": 2,
        "save_steps": 4,
        "learning_rate": 1e-9,
        "early_stopping_patience": 2,
        "metric_for_best_model": "acc",
    },
    "streamed": {"max_steps": 4, "streaming": True, **LAST},
}


@pytest.fixture
def steps(monkeypatch) -> list[int]:
    """Numbers of the steps that are trained."""
    taken: list[int] = []
    original = AdapterTrainer.training_step

    def training_step(self, *args, **kwargs):
        taken.append(self.state.global_step + 1)
        return original(self, *args, **kwargs)

    monkeypatch.setattr(AdapterTrainer, "training_step", training_step)
    return taken


def digest(out: Path) -> str:
    return hashlib.sha256((out / WEIGHTS).read_bytes()).hexdigest()


def fewer_rows(part: str):
    """`load_data` of a file that has lost its last row of a split."""

    def load(recipe, tokenizer):
        data = load_data(recipe, tokenizer)
        encoded = getattr(data, part)
        return replace(data, **{part: replace(encoded, rows=encoded.rows[:-1])})

    return load


@pytest.mark.parametrize("end", ENDS)
def test_nothing_is_trained_after_the_end(tiny_recipe, steps, capsys, end):
    recipe = Recipe.from_dict(tiny_recipe | ENDS[end])
    out = Path(recipe.output_dir)
    first = train(recipe)
    before, record = digest(out), (out / "record.json").read_bytes()
    trained = len(steps)
    again = train(recipe, resume=True)
    assert (out / "record.json").read_bytes() == record
    # Killed after the last checkpoint: neither adapter nor record had been written.
    for name in (WEIGHTS, "adapter_config.json", "record.json", "manifest.json"):
        (out / name).unlink()
    late = train(Recipe.from_yaml(out / "config.yaml"), resume=True)
    assert len(steps) == trained
    assert digest(out) == before
    assert again.metrics["steps"] == late.metrics["steps"] == first.metrics["steps"]
    assert late.metrics["kept_step"] == first.metrics["kept_step"]
    assert late.metrics.get("eval_acc") == first.metrics.get("eval_acc")
    assert "train_loss" not in RunRecord.read(out / "record.json").metrics
    assert f"ended at step {first.metrics['steps']}; nothing was left to train" in capsys.readouterr().err


def test_a_finished_run_goes_on_with_more_steps_or_more_patience(tiny_recipe, steps):
    options = tiny_recipe | ENDS["stopped early"]
    assert train(Recipe.from_dict(options)).metrics["steps"] == 6
    more = Recipe.from_dict(options | {"early_stopping_patience": 4})
    assert train(more, resume=True).metrics["steps"] == 10
    last = Path(more.output_dir) / "checkpoints" / "checkpoint-10" / "trainer_state.json"
    assert TrainerState.load_from_json(str(last)).global_step == 10
    assert max(steps) == 10
    shutil.rmtree(more.output_dir)
    train(Recipe.from_dict(tiny_recipe | ENDS["max_steps"]))
    longer = Recipe.from_dict(tiny_recipe | ENDS["max_steps"] | {"max_steps": 5})
    assert train(longer, resume=True).metrics["steps"] == 5


def test_a_share_of_the_steps_is_no_other_value_in_a_checkpoint(tiny_recipe, monkeypatch):
    """`Trainer` compares the arguments with the checkpoint's, which are whole numbers."""
    warned = []
    monkeypatch.setattr(trainer_utils.logger, "warning_once", warned.append)
    options = tiny_recipe | {
        "eval_steps": 0.5,
        "logging_steps": 0.25,
        "max_steps": 8,
        "save_total_limit": None,
    }
    recipe = Recipe.from_dict(options)
    whole = train(recipe)
    out = Path(recipe.output_dir)
    shutil.rmtree(out / "checkpoints" / "checkpoint-8")
    again = train(recipe, resume=True)
    assert warned == []
    assert [entry["step"] for entry in again.history] == [entry["step"] for entry in whole.history]


def test_changed_intervals_take_effect_on_resume(tiny_recipe):
    options = tiny_recipe | {"max_steps": 3, "eval_steps": 3}
    train(Recipe.from_dict(options))
    result = train(Recipe.from_dict(options | {"max_steps": 5, "eval_steps": 1}), resume=True)
    assert [entry["step"] for entry in result.history if "eval_loss" in entry] == [3, 4, 5]


@pytest.mark.parametrize("lost", [False, True])
def test_the_best_checkpoint_is_found_where_a_run_was_moved_to(
    tiny_recipe, tmp_path, monkeypatch, capsys, lost
):
    scores = iter([0.9, 0.2, 0.4])
    monkeypatch.setattr(AdapterTrainer, "accuracy", lambda self: {"acc": next(scores)})
    values = tiny_recipe | {"eval_steps": 2, "metric_for_best_model": "acc", "max_steps": 4}
    train(Recipe.from_dict(values))
    moved = tmp_path / "elsewhere"
    Path(values["output_dir"]).rename(moved)
    checkpoints = moved / "checkpoints"
    if lost:
        shutil.rmtree(checkpoints / "checkpoint-2")
    capsys.readouterr()
    result = train(Recipe.from_dict(values | {"output_dir": str(moved), "max_steps": 6}), resume=True)
    kept, accuracy = (6, 0.4) if lost else (2, 0.9)
    assert result.metrics["kept_step"] == kept
    assert result.metrics["eval_acc"] == accuracy
    assert (moved / WEIGHTS).read_bytes() == (checkpoints / f"checkpoint-{kept}" / WEIGHTS).read_bytes()
    told = "the best checkpoint, of step 2, is gone; best of those that are there: step 4"
    assert (told in capsys.readouterr().err) == lost


def test_another_metric_chooses_among_the_checkpoints_that_are_there(tiny_recipe, monkeypatch, capsys):
    scores = iter([0.9, 0.5, 0.4])
    monkeypatch.setattr(AdapterTrainer, "accuracy", lambda self: {"acc": next(scores)})
    values = tiny_recipe | {"eval_steps": 2, "max_steps": 4, "metric_for_best_model": "acc"}
    first = train(Recipe.from_dict(values))
    assert first.metrics["kept_step"] == 2
    losses = {entry["step"]: entry["eval_loss"] for entry in first.history if "eval_loss" in entry}
    again = train(Recipe.from_dict(values | {"max_steps": 6, "metric_for_best_model": "loss"}), resume=True)
    losses |= {entry["step"]: entry["eval_loss"] for entry in again.history if "eval_loss" in entry}
    best = min(losses, key=losses.__getitem__)
    assert best != 2, "the test needs losses that fall"
    assert (again.metrics["kept_step"], again.metrics["eval_loss"]) == (best, losses[best])
    assert "metric_for_best_model (acc, now loss)" in capsys.readouterr().err


@pytest.mark.parametrize("part", ["validation", "train"])
def test_other_rows_are_told_and_validations_of_them_not_compared(tiny_recipe, monkeypatch, capsys, part):
    scores = iter([0.9, 0.5, 0.4, 0.3])
    monkeypatch.setattr(AdapterTrainer, "accuracy", lambda self: {"acc": next(scores)})
    values = tiny_recipe | {"eval_steps": 2, "max_steps": 4, "metric_for_best_model": "acc"}
    train(Recipe.from_dict(values))
    with monkeypatch.context() as patch:
        patch.setattr("graphlora.training.workbench.load_data", fewer_rows(part))
        done = train(Recipe.from_dict(values), resume=True)
        assert done.metrics["kept_step"] == 2, "nothing was left to train"
        more = train(Recipe.from_dict(values | {"max_steps": 6}), resume=True)
        told = capsys.readouterr().err
        if part == "train":
            assert more.metrics["kept_step"] == 2
            assert "the training rows are not what they were at checkpoint-4" in told
            return
        assert (more.metrics["kept_step"], more.metrics["eval_acc"]) == (6, 0.4)
        assert "not what it was at checkpoint-4: validation rows; best validation: none yet" in told
        last = train(Recipe.from_dict(values | {"max_steps": 8}), resume=True)
    assert last.metrics["kept_step"] == 6, "the rows are the same, but 0.9 was of others"
