"""An ended run keeps its adapter and its record; a model card keeps the words that somebody wrote."""

import shutil
from pathlib import Path

import pytest

from graphlora.records import RunRecord
from graphlora.training import Recipe, train
from graphlora.training.checkpoints import go_on_command
from graphlora.training.trainer import AdapterTrainer

FILES = ("adapter_model.safetensors", "adapter_config.json", "record.json", "manifest.json", "config.yaml")


@pytest.fixture
def ended(tiny_recipe, monkeypatch) -> dict:
    """Options of a run of four steps that has ended and kept its second."""
    scores = iter([0.9, 0.2])
    monkeypatch.setattr(AdapterTrainer, "accuracy", lambda self: {"acc": next(scores)})
    options = tiny_recipe | {"eval_steps": 2, "max_steps": 4, "metric_for_best_model": "acc"}
    assert train(Recipe.from_dict(options)).metrics["kept_step"] == 2
    return options


def contents(out: Path) -> dict[str, bytes]:
    return {name: (out / name).read_bytes() for name in FILES}


def lose_best(out: Path) -> None:
    shutil.rmtree(out / "checkpoints" / "checkpoint-2")


def damage_best(out: Path) -> None:
    path = out / "checkpoints" / "checkpoint-2" / FILES[0]
    path.write_bytes(path.read_bytes()[:-1] + b"?")


@pytest.mark.parametrize("change", [{}, {"eval_limit": 2}, {"save_total_limit": 1}])
@pytest.mark.parametrize("harm", [None, lose_best, damage_best])
def test_what_an_ended_run_has_left_stays(ended, harm, change):
    out = Path(ended["output_dir"])
    before = contents(out)
    if harm is not None:
        harm(out)
    result = train(Recipe.from_dict(ended | change), resume=True)
    assert contents(out) == before
    assert result.metrics == result.record.metrics == RunRecord.read(out / "record.json").metrics


def test_another_choice_takes_another_checkpoint_and_keeps_what_training_measured(ended):
    out = Path(ended["output_dir"])
    before = RunRecord.read(out / "record.json")
    train(Recipe.from_dict(ended | {"load_best_model_at_end": False}), resume=True)
    now = RunRecord.read(out / "record.json")
    assert (now.metrics["kept_step"], now.metrics["eval_acc"]) == (4, 0.2)
    last = out / "checkpoints" / "checkpoint-4" / FILES[0]
    assert (out / FILES[0]).read_bytes() == last.read_bytes()
    assert now.config["load_best_model_at_end"] is False
    for name in ("train_loss", "step_time", "rows", "steps"):
        assert now.metrics[name] == before.metrics[name]
    assert (now.data_hash, now.wall_time) == (before.data_hash, before.wall_time)


def test_a_damaged_adapter_is_made_again(ended):
    out = Path(ended["output_dir"])
    before = contents(out)
    (out / FILES[0]).write_bytes(before[FILES[0]][:-1] + b"?")
    train(Recipe.from_dict(ended), resume=True)
    after = contents(out)
    assert (after[FILES[0]], after["record.json"]) == (before[FILES[0]], before["record.json"])


def test_words_in_a_model_card_stay(tiny_recipe):
    out = Path(tiny_recipe["output_dir"])
    options = tiny_recipe | {"max_steps": 1}
    train(Recipe.from_dict(options))
    card = out / "README.md"
    card.write_text(card.read_text() + "\nMY NOTES\n")
    train(Recipe.from_dict(options | {"max_steps": 2}), resume=True)
    assert "MY NOTES" in card.read_text()


@pytest.mark.parametrize("text", ["# My project\n\nWords.\n", "---\na: [\n---\n\n# My project\n"])
def test_a_readme_that_was_there_stays(tiny_recipe, text):
    out = Path(tiny_recipe["output_dir"])
    out.mkdir(parents=True)
    (out / "README.md").write_text(text)
    for overwrite in (False, True):
        train(Recipe.from_dict(tiny_recipe | {"max_steps": 1}), overwrite=overwrite)
        assert "# My project" in (out / "README.md").read_text()


def test_a_run_that_is_replaced_leaves_no_card(tiny_recipe):
    out = Path(tiny_recipe["output_dir"])
    experts = {"method": "graphlora", "num_experts": 4, "router_hidden_size": 16}
    train(Recipe.from_dict(tiny_recipe | experts | {"max_steps": 1}))
    assert "graphlora" in (out / "README.md").read_text()
    train(Recipe.from_dict(tiny_recipe | {"method": "lora", "max_steps": 1}), overwrite=True)
    assert "<!-- graphlora -->" not in (out / "README.md").read_text()


def test_a_record_is_taken_away_before_its_adapter_is(tiny_recipe, monkeypatch):
    train(Recipe.from_dict(tiny_recipe | {"max_steps": 1}))
    out = Path(tiny_recipe["output_dir"])

    def crash(self, path):
        raise OSError("the machine went down")

    with monkeypatch.context() as patch:
        patch.setattr(RunRecord, "write", crash)
        with pytest.raises(OSError, match="went down"):
            train(Recipe.from_dict(tiny_recipe | {"max_steps": 2}), resume=True)
    assert not (out / "record.json").exists()
    assert not (out / "manifest.json").exists()


@pytest.mark.parametrize(
    ("environment", "launch"),
    [
        ({}, ""),
        ({"WORLD_SIZE": "2", "LOCAL_WORLD_SIZE": "2"}, "torchrun --nproc_per_node 2 -m "),
        ({"WORLD_SIZE": "4", "LOCAL_WORLD_SIZE": "2"}, ""),
        ({"WORLD_SIZE": "2", "LOCAL_WORLD_SIZE": "2", "ACCELERATE_USE_FSDP": "true"}, ""),
    ],
)
def test_the_command_to_go_on_can_be_pasted(monkeypatch, environment, launch):
    for name in ("WORLD_SIZE", "LOCAL_WORLD_SIZE", "ACCELERATE_USE_FSDP"):
        monkeypatch.delenv(name, raising=False)
    for name, value in environment.items():
        monkeypatch.setenv(name, value)
    expected = f"{launch}graphlora train --config 'my runs/a/config.yaml' --resume"
    assert go_on_command(Path("my runs/a")) == expected
