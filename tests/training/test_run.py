"""Whole runs: what they leave, that they can be repeated, resumed, stopped, and that they lose nothing."""

import json
import os
import signal
import subprocess
import sys
import threading
from pathlib import Path

import pytest
import torch
import yaml
from peft import PeftModel
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM, TrainerCallback

from graphlora.errors import GraphLoraError
from graphlora.records import RunRecord
from graphlora.training import Recipe, train
from graphlora.training.interrupts import TrainingInterrupted
from graphlora.training.trainer import AdapterTrainer

WEIGHTS = "adapter_model.safetensors"
GRAPHLORA = {"num_experts": 4, "top_k": 2, "router_hidden_size": 16}


def weights(folder) -> dict[str, torch.Tensor]:
    return load_file(Path(folder) / WEIGHTS)


def assert_equal_runs(one: Path, other: Path) -> None:
    first, second = weights(one), weights(other)
    assert first.keys() == second.keys()
    for name, value in first.items():
        assert torch.equal(value, second[name]), name


def assert_equal_state(one, other) -> None:
    """Equal nested optimizer states, bit for bit."""
    if isinstance(one, torch.Tensor):
        assert torch.equal(one, other)
    elif isinstance(one, dict):
        assert one.keys() == other.keys()
        for key in one:
            assert_equal_state(one[key], other[key])
    elif isinstance(one, (list, tuple)):
        assert len(one) == len(other)
        for first, second in zip(one, other, strict=True):
            assert_equal_state(first, second)
    else:
        assert one == other


def stop_at(monkeypatch, step: int, number: int = signal.SIGINT) -> None:
    """Send a signal to this process in the middle of a step."""
    original = AdapterTrainer.training_step
    sent = []

    def training_step(self, *args, **kwargs):
        if self.state.global_step == step - 1 and not sent:
            sent.append(number)
            os.kill(os.getpid(), number)
        return original(self, *args, **kwargs)

    monkeypatch.setattr(AdapterTrainer, "training_step", training_step)


def test_a_run_leaves_the_adapter_its_recipe_and_its_record(any_recipe, tiny_model):
    result = train(Recipe.from_dict(any_recipe))
    out = Path(any_recipe["output_dir"])
    assert {path.name for path in out.iterdir()} == {
        WEIGHTS, "adapter_config.json", "README.md", "config.yaml", "record.json", "manifest.json", "checkpoints",
    }  # fmt: skip
    record = RunRecord.read(out / "record.json")
    assert record.kind == "training"
    assert record.seed == 0
    assert record.config["learning_rate"] == 1e-2
    assert record.metrics["steps"] == 6
    assert record.metrics["num_trained"] > 0
    assert record.metrics["tokens_per_second"] > 0
    assert record.peak_memory is not None
    assert record.data_hash
    assert 0 <= record.metrics["eval_acc_norm"] <= 1
    base = AutoModelForCausalLM.from_pretrained(tiny_model)
    again = PeftModel.from_pretrained(base, out)
    ids = torch.arange(4, 20)[None]
    result.model.eval()
    torch.testing.assert_close(
        again(input_ids=ids).logits, result.model(input_ids=ids).logits, rtol=0, atol=0
    )


def test_the_written_recipe_reproduces_the_run(any_recipe, tmp_path):
    train(Recipe.from_dict(any_recipe))
    written = Recipe.from_yaml(Path(any_recipe["output_dir"]) / "config.yaml")
    train(written.changed(output_dir=str(tmp_path / "again")))
    assert_equal_runs(Path(any_recipe["output_dir"]), tmp_path / "again")
    one, two = (
        RunRecord.read(Path(folder) / "record.json")
        for folder in (any_recipe["output_dir"], tmp_path / "again")
    )
    assert one.data_hash == two.data_hash
    assert one.metrics["train_loss"] == two.metrics["train_loss"]


@pytest.mark.parametrize(
    ("method", "strategy", "stop"),
    [
        ("graphlora", "random", 4),
        ("graphlora", "random", 5),
        ("graphlora", "group_by_length", 9),
        ("lora", "random", 9),
    ],
)
def test_a_resumed_run_equals_an_uninterrupted_one(
    tiny_recipe, tmp_path, monkeypatch, method, strategy, stop
):
    """9 batches of 4 make an epoch: with accumulation 2, step 5 ends the first one with half a step."""
    options = tiny_recipe | {"method": method} | (GRAPHLORA if method == "graphlora" else {})
    options |= {
        "max_steps": 10,
        "eval_steps": 5,
        "gradient_accumulation_steps": 2,
        "train_sampling_strategy": strategy,
        "load_best_model_at_end": False,
        "save_total_limit": None,
    }
    whole, parts = tmp_path / "whole", tmp_path / "parts"
    train(Recipe.from_dict(options | {"output_dir": str(whole)}))
    recipe = Recipe.from_dict(options | {"output_dir": str(parts)})
    with monkeypatch.context() as patch:
        stop_at(patch, stop)
        with pytest.raises(TrainingInterrupted, match="--resume"):
            train(recipe)
    assert not (parts / WEIGHTS).exists()
    train(recipe, resume=True)
    last = Path("checkpoints") / "checkpoint-10"
    assert_equal_runs(whole, parts)
    assert_equal_runs(whole / last, parts / last)
    for name in ("optimizer.pt", "scheduler.pt", "rng_state.pth"):
        one, two = (torch.load(folder / last / name, weights_only=False) for folder in (whole, parts))
        if name == "rng_state.pth":
            one, two = one["cpu"], two["cpu"]
        assert_equal_state(one, two)
    first, second = (
        json.loads((folder / last / "trainer_state.json").read_text()) for folder in (whole, parts)
    )
    losses = [
        [entry.get("loss") for entry in state["log_history"] if "loss" in entry] for state in (first, second)
    ]
    assert losses[0] == losses[1]


def test_early_stopping_goes_on_counting_after_a_resume(tiny_recipe, tmp_path, monkeypatch):
    options = tiny_recipe | {
        "max_steps": 20,
        "eval_steps": 2,
        "learning_rate": 1e-9,
        "early_stopping_patience": 3,
        "metric_for_best_model": "acc",
    }
    whole = train(Recipe.from_dict(options | {"output_dir": str(tmp_path / "whole")}))
    assert whole.metrics["steps"] == 8
    recipe = Recipe.from_dict(options)
    with monkeypatch.context() as patch:
        stop_at(patch, 5, signal.SIGTERM)
        with pytest.raises(TrainingInterrupted):
            train(recipe)
    assert train(recipe, resume=True).metrics["steps"] == 8


def test_the_best_checkpoint_on_the_whole_validation_split_is_kept(tiny_recipe, monkeypatch):
    scores = iter([0.2, 0.9, 0.4])
    seen = []

    def accuracy(self):
        seen.append([len(items) for items in self.validation.values()])
        return {"acc": next(scores)}

    monkeypatch.setattr(AdapterTrainer, "accuracy", accuracy)
    recipe = Recipe.from_dict(
        tiny_recipe | {"eval_steps": 2, "metric_for_best_model": "acc", "save_total_limit": 1}
    )
    result = train(recipe)
    assert result.metrics["kept_step"] == 4
    assert result.metrics["eval_acc"] == 0.9
    out = Path(recipe.output_dir)
    assert {path.name for path in (out / "checkpoints").iterdir()} == {"checkpoint-4", "checkpoint-6"}
    assert_equal_runs(out, out / "checkpoints" / "checkpoint-4")
    assert seen == [[4]] * 3


@pytest.mark.parametrize("best", [2, 4, 6])
def test_the_best_checkpoint_is_kept_that_save_steps_would_have_passed_by(tiny_recipe, monkeypatch, best):
    scores = iter([0.9 if step == best else step / 10 for step in (2, 4, 6, 8)])
    monkeypatch.setattr(AdapterTrainer, "accuracy", lambda self: {"acc": next(scores)})
    values = tiny_recipe | {"max_steps": 8, "eval_steps": 2, "save_steps": 4, "metric_for_best_model": "acc"}
    result = train(Recipe.from_dict(values))
    assert (result.metrics["kept_step"], result.metrics["eval_acc"]) == (best, 0.9)
    out = Path(values["output_dir"])
    assert_equal_runs(out, out / "checkpoints" / f"checkpoint-{best}")


def test_a_loss_that_is_not_finite_stops_before_the_step_and_keeps_the_last_checkpoint(
    tiny_recipe, monkeypatch
):
    original = AdapterTrainer.compute_loss

    def compute_loss(self, model, inputs, *args, **kwargs):
        loss = original(self, model, inputs, *args, **kwargs)
        return loss * float("nan") if self.state.global_step == 4 else loss

    monkeypatch.setattr(AdapterTrainer, "compute_loss", compute_loss)
    with pytest.raises(
        GraphLoraError, match=r"loss is nan at step 5.*checkpoint-3.*--resume --learning_rate 0.0025"
    ):
        train(Recipe.from_dict(tiny_recipe))
    kept = Path(tiny_recipe["output_dir"]) / "checkpoints" / "checkpoint-3"
    assert all(torch.isfinite(value).all() for value in weights(kept).values())
    monkeypatch.undo()
    changed = Recipe.from_yaml(Path(tiny_recipe["output_dir"]) / "config.yaml").changed(learning_rate=0.0025)
    assert train(changed, resume=True).metrics["steps"] == 6


def test_weights_that_are_not_finite_are_not_saved(tiny_recipe, monkeypatch):
    class Spoil(TrainerCallback):
        def on_optimizer_step(self, args, state, control, model=None, **kwargs):
            if state.global_step == 5:
                next(p for p in model.parameters() if p.requires_grad).data.fill_(float("inf"))

    original = AdapterTrainer.__init__

    def spoiled(self, *args, **kwargs):
        original(self, *args, **kwargs)
        self.add_callback(Spoil())

    monkeypatch.setattr(AdapterTrainer, "__init__", spoiled)
    with pytest.raises(GraphLoraError, match=r"not finite after step 6.*checkpoint-3"):
        train(Recipe.from_dict(tiny_recipe))


def test_a_changed_learning_rate_takes_effect_on_resume(tiny_recipe, monkeypatch):
    options = tiny_recipe | {"lr_scheduler_type": "constant", "warmup_ratio": 0.0}
    with monkeypatch.context() as patch:
        stop_at(patch, 3)
        with pytest.raises(TrainingInterrupted):
            train(Recipe.from_dict(options))
    train(Recipe.from_dict(options | {"learning_rate": 5e-4}), resume=True)
    state = Path(options["output_dir"]) / "checkpoints" / "checkpoint-6" / "trainer_state.json"
    rates = [
        entry["learning_rate"] for entry in json.loads(state.read_text())["log_history"] if "loss" in entry
    ]
    assert rates == pytest.approx([1e-2] * 3 + [5e-4] * 3)


def test_a_checkpoint_of_other_parameters_is_told(tiny_recipe):
    """As of a version that took the recipe's modules in another way."""
    short = tiny_recipe | {"max_steps": 3, "target_modules": ["q_proj", "v_proj"]}
    train(Recipe.from_dict(short))
    other = short | {"max_steps": 6, "target_modules": ["q_proj"]}
    (Path(tiny_recipe["output_dir"]) / "config.yaml").write_text(yaml.safe_dump(other))
    with pytest.raises(
        GraphLoraError, match=r"checkpoint-3 is of a run that trained other parameters.*output_dir"
    ):
        train(Recipe.from_dict(other), resume=True)


def test_another_adapter_or_data_cannot_be_resumed(tiny_recipe):
    train(Recipe.from_dict(tiny_recipe))
    with pytest.raises(GraphLoraError, match=r"another r \(4, now 8\), seed \(0, now 1\)"):
        train(Recipe.from_dict(tiny_recipe | {"r": 8, "seed": 1}), resume=True)


def test_an_existing_run_is_neither_overwritten_nor_lost(tiny_recipe):
    recipe = Recipe.from_dict(tiny_recipe)
    train(recipe)
    before = weights(recipe.output_dir)
    with pytest.raises(GraphLoraError, match="holds a run already"):
        train(recipe)
    with pytest.raises(GraphLoraError, match="no data file"):
        train(recipe.changed(task="missing.jsonl"), overwrite=True)
    assert all(torch.equal(value, before[name]) for name, value in weights(recipe.output_dir).items())
    train(recipe.changed(seed=1), overwrite=True)
    assert not all(torch.equal(value, before[name]) for name, value in weights(recipe.output_dir).items())


def test_a_run_that_fails_before_its_first_checkpoint_is_in_nobodys_way(tiny_recipe, monkeypatch):
    def fail(self, *args, **kwargs):
        raise RuntimeError("no such kernel")

    recipe = Recipe.from_dict(tiny_recipe)
    with monkeypatch.context() as patch:
        patch.setattr(AdapterTrainer, "training_step", fail)
        with pytest.raises(RuntimeError, match="no such kernel"):
            train(recipe)
    assert train(recipe.changed(r=2)).metrics["steps"] == 6
    written = Path(recipe.output_dir) / "config.yaml"
    with monkeypatch.context() as patch:
        patch.setattr(AdapterTrainer, "training_step", fail)
        with pytest.raises(RuntimeError, match="no such kernel"):
            train(Recipe.from_yaml(written), overwrite=True)
    assert Recipe.from_yaml(written).r == 2


def test_a_damaged_newest_checkpoint_is_passed_over(tiny_recipe):
    train(Recipe.from_dict(tiny_recipe | {"load_best_model_at_end": False}))
    newest = Path(tiny_recipe["output_dir"]) / "checkpoints" / "checkpoint-6" / "optimizer.pt"
    newest.write_bytes(newest.read_bytes()[:-100])
    before = weights(tiny_recipe["output_dir"])
    train(Recipe.from_dict(tiny_recipe | {"load_best_model_at_end": False}), resume=True)
    assert all(torch.equal(value, before[name]) for name, value in weights(tiny_recipe["output_dir"]).items())


def test_a_disk_that_fills_up_is_one_line_and_keeps_the_checkpoint_before(tiny_recipe, tmp_path):
    """A limit on the size of files stands for the full disk; it is real, in a process of its own."""
    script = f"""
import resource, signal, warnings
warnings.simplefilter("ignore")
from graphlora.training import Recipe, train
from graphlora.training.trainer import AdapterTrainer
signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
save = AdapterTrainer._save_checkpoint
def _save_checkpoint(self, *args):
    if self.state.global_step > 3:
        resource.setrlimit(resource.RLIMIT_FSIZE, (9000, resource.RLIM_INFINITY))
    save(self, *args)
AdapterTrainer._save_checkpoint = _save_checkpoint
try:
    train(Recipe.from_dict({tiny_recipe!r}))
except ValueError as error:
    print("LINE", error)
"""
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, check=True)
    assert "LINE cannot write" in done.stdout, done.stderr
    assert "checkpoint-3" in done.stdout
    folder = Path(tiny_recipe["output_dir"]) / "checkpoints"
    assert [path.name for path in folder.iterdir()] == ["checkpoint-3"]
    result = train(Recipe.from_dict(tiny_recipe), resume=True)
    assert result.metrics["steps"] == 6


def test_two_processes_share_the_work_and_choose_the_same_checkpoint(tiny_recipe, tmp_path):
    recipe = tiny_recipe | {"method": "graphlora", **GRAPHLORA, "per_device_train_batch_size": 2}
    (tmp_path / "recipe.yaml").write_text(Recipe.from_dict(recipe).to_yaml())
    launch = [
        sys.executable,
        "-W",
        "ignore",
        "-m",
        "torch.distributed.run",
        "--standalone",
        "--nproc_per_node",
        "2",
    ]
    words = ["-m", "graphlora.cli", "train", "--config", str(tmp_path / "recipe.yaml")]
    done = subprocess.run([*launch, *words], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert done.stdout.count("trained 6 steps") == 1
    assert "Could not locate the best model" not in done.stderr
    out = Path(recipe["output_dir"])
    kept = RunRecord.read(out / "record.json").metrics["kept_step"]
    assert_equal_runs(out, out / "checkpoints" / f"checkpoint-{kept}")
    written = {path.name for path in (out / "checkpoints" / "checkpoint-6").iterdir()}
    assert {"rng_state_0.pth", "rng_state_1.pth"} <= written


def test_training_works_outside_the_main_thread(tiny_recipe):
    results = []
    thread = threading.Thread(target=lambda: results.append(train(Recipe.from_dict(tiny_recipe))))
    thread.start()
    thread.join()
    assert results[0].metrics["steps"] == 6


@pytest.mark.parametrize(
    "options",
    [
        {"packing": True},
        {"gradient_checkpointing": True},
        {"dtype": "bfloat16"},
        {"bf16": True, "dtype": "bfloat16"},
        {"loraplus_lr_ratio": 4.0},
        {"train_on": "all"},
        {"scoring": "letter"},
        {"eval_strategy": "epoch", "max_steps": -1, "num_train_epochs": 1},
        {"eval_strategy": "no"},
        {"lr_scheduler_type": "cosine", "warmup_steps": 2},
        {"truncation": "drop", "max_length": 17},
    ],
    ids=lambda options: next(iter(options)) + "=" + str(next(iter(options.values()))),
)
def test_options_train_and_learn(tiny_recipe, options):
    # With few tokens and a high learning rate the normal loss is far larger than that of the text, and hides it.
    adapter = {"method": "graphlora", **GRAPHLORA, "router_normal_loss_coef": 1.0}
    result = train(Recipe.from_dict(tiny_recipe | adapter | options))
    assert 0 < result.metrics["train_loss"] < 10
    trained = [p for p in result.model.parameters() if p.requires_grad]
    assert all(p.dtype == torch.float32 for p in trained)


def test_trackers_get_the_routing_with_few_keys(tiny_recipe):
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    train(
        Recipe.from_dict(tiny_recipe | {"method": "graphlora", "num_experts": 4, "report_to": "tensorboard"})
    )
    folder = next((Path(tiny_recipe["output_dir"]) / "runs").iterdir())
    events = EventAccumulator(str(folder))
    events.Reload()
    tags = [tag for tag in events.Tags()["scalars"] if "router/" in tag]
    assert 15 <= len(tags) <= 30
    assert any(tag.endswith("expert_load_max_mean") for tag in tags)


def test_free_text_is_validated_by_its_loss(tiny_recipe, texts_file):
    result = train(Recipe.from_dict(tiny_recipe | {"task": str(texts_file)}))
    assert result.record.config["metric_for_best_model"] == "loss"
    assert "eval_acc" not in result.metrics


def test_only_what_validation_measures_can_choose_the_checkpoint(
    tiny_recipe, texts_file, choices_file, tmp_path
):
    texts = Recipe.from_dict(tiny_recipe | {"task": str(texts_file), "metric_for_best_model": "acc"})
    with pytest.raises(
        GraphLoraError, match=r"metric_for_best_model is 'acc'.*use one of loss, or leave it out"
    ):
        train(texts)
    assert train(texts.changed(metric_for_best_model="eval_loss", max_steps=1)).metrics["kept_step"] == 1
    other = tmp_path / "other.jsonl"
    other.write_text(choices_file.read_text().replace("What color", "Which color"))
    tasks = {str(choices_file): 2.0, str(other): 1.0}
    mixture = tiny_recipe | {"task": tasks, "output_dir": str(tmp_path / "mixture"), "max_steps": 1}
    best = train(Recipe.from_dict(mixture | {"metric_for_best_model": f"{other}_acc"}))
    assert best.metrics[f"eval_{other}_acc"] >= 0


def test_a_mixture_reports_each_task_and_their_mean(tiny_recipe, choices_file, tmp_path):
    other = tmp_path / "other.jsonl"
    other.write_text(choices_file.read_text().replace("What color", "Which color"))
    tasks = {str(choices_file): 2.0, str(other): 1.0}
    metrics = train(Recipe.from_dict(tiny_recipe | {"task": tasks})).metrics
    each = [metrics[f"eval_{name}_acc"] for name in tasks]
    assert metrics["eval_acc"] == pytest.approx(sum(each) / 2)
