"""Whole studies with a tiny model: records, equality with `graphlora train`, what is kept, what fails."""

import json
import shutil
from pathlib import Path

import pytest
import torch

from graphlora.errors import GraphLoraError
from graphlora.evaluation.multiple_choice import score_examples, summarize
from graphlora.records import RunRecord
from graphlora.study import kept
from graphlora.study.execute import curve, execute, method_name
from graphlora.study.health import expert_overlap, tie_rate
from graphlora.study.kept import KeptWorkbench, fingerprint
from graphlora.study.plan import make_runs
from graphlora.study.records import StudyFolder
from graphlora.study.runner import run_study
from graphlora.study.spec import read_spec
from graphlora.study.status import find_status, plan_text, status_text
from graphlora.tasks import load_examples
from graphlora.training import train
from graphlora.training.adapting import add_adapter
from graphlora.training.loading import load_base_model
from graphlora.training.recipe import Recipe
from graphlora.training.trainer import AdapterTrainer


def changed(values: dict, **parts) -> dict:
    return {
        **values,
        **{
            name: {**values[name], **part} if isinstance(part, dict) else part for name, part in parts.items()
        },
    }


@pytest.fixture(scope="module")
def finished(study_values, tmp_path_factory):
    """The study after a run of its own, with the number of times that model and data were loaded."""
    folder = StudyFolder(tmp_path_factory.mktemp("results") / "tiny")
    spec = read_spec(study_values)
    runs, lines = make_runs(spec), []
    with pytest.MonkeyPatch.context() as patch:
        loads = {"base": 0, "data": 0, "tokenizer": 0}
        count(patch, loads, "base", kept, "load_base_model")
        count(patch, loads, "data", kept.Workbench, "data")
        count(patch, loads, "tokenizer", kept.Workbench, "tokenizer")
        assert run_study(runs, folder, tell=lines.append) == 0
    return spec, runs, folder, loads, lines


def count(patch, loads, name, owner, attribute):
    original = getattr(owner, attribute)

    def counted(*args, **kwargs):
        loads[name] += 1
        return original(*args, **kwargs)

    patch.setattr(owner, attribute, counted)


def test_every_run_leaves_one_record_and_nothing_else(finished):
    _, runs, folder, _, lines = finished
    assert len(lines) == len(runs) == 5
    assert lines[-1].startswith("[5/5, 0 s left] done tiny: graphlora on colors, seed 1: acc_norm 0.")
    assert {path.name for path in folder.path.glob("*.json")} == {f"{run.run_id}.json" for run in runs}
    assert list((folder.path / "claims").iterdir()) == []
    assert list((folder.path / ".work").iterdir()) == []


def test_model_and_data_are_loaded_once(finished):
    assert finished[3] == {"base": 1, "data": 1, "tokenizer": 1}


def test_a_record_says_what_ran_and_how_it_went(finished, colors):
    _, runs, folder, _, _ = finished
    run = next(run for run in runs if run.variant == "graphlora" and run.seed == 1)
    record = folder.records([run])[run.run_id]
    assert (record.kind, record.study, record.variant, record.seed) == ("study", "tiny", "graphlora", 1)
    assert record.run_id == run.run_id
    assert record.provenance["workers_on_device"] == 1
    assert (record.model, record.dtype, record.device) == ("tiny", "float32", "cpu")
    assert record.config["learning_rate"] == 1e-2
    assert record.config["adapter"]["num_experts"] == 4
    assert record.config["adapter"]["edge_density"] == 0.1
    assert record.config["policy"]["max_steps"] == 6
    assert str(Path(run.options["model"]).parent) not in record.to_json()
    assert str(colors.parent) not in record.to_json()
    metrics = record.metrics
    assert (metrics["task"], metrics["method"], metrics["metric"]) == ("colors", "graphlora", "acc_norm")
    assert metrics["test"]["colors"]["num"] == 10
    assert metrics["score"] == metrics["test"]["colors"]["acc_norm"]
    assert metrics["validation"]["colors"]["num"] == 4
    assert {"acc", "acc_norm", "acc_stderr", "loss"} <= set(metrics["validation"]["colors"])
    assert metrics["steps"] == 6
    assert [point["step"] for point in metrics["curve"]] == [1, 2, 3, 4, 5, 6]
    assert "eval_loss" in metrics["curve"][1]
    assert metrics["train_loss"] == pytest.approx(sum(point["loss"] for point in metrics["curve"]) / 6)
    assert metrics["step_time"] > 0
    assert metrics["tokens_per_second"] > 0
    assert list(metrics["routing"]) == ["model.layers.0.mlp", "model.layers.1.mlp"]
    for block in metrics["routing"].values():
        assert len(block["expert_load"]) == 4
        assert sum(block["validation_load"]) == pytest.approx(1)
        assert 0 <= block["tie_rate"] <= 1
        assert 0 <= block["expert_overlap"] <= 1
        spread = float(torch.tensor(block["expert_load"]).std(correction=0))
        assert block["load_cv"] == pytest.approx(4 * spread, rel=1e-4)


def test_the_base_model_has_a_record_of_its_own(finished):
    _, runs, folder, _, _ = finished
    record = folder.records(runs)[runs[0].run_id]
    assert (record.variant, record.seed) == ("base", None)
    assert record.metrics["test"] == record.metrics["baseline"]
    assert record.metrics["score"] == record.metrics["test"]["colors"]["acc_norm"]
    model = load_base_model(runs[0].options["model"], torch.float32)
    tokenizer = KeptWorkbench().tokenizer(runs[0].recipe())
    items = load_examples(runs[0].options["task"], "test")
    expected = summarize(score_examples(model, tokenizer, items, progress=False))
    assert record.metrics["test"]["colors"]["acc_norm"] == expected["acc_norm"]


@pytest.mark.parametrize("variant", ["lora", "graphlora"])
def test_a_run_equals_graphlora_train_with_the_same_recipe(finished, tmp_path, variant):
    """The last run of a worker, whose base model has carried three adapters before."""
    _, runs, folder, _, _ = finished
    run = next(run for run in runs if run.variant == variant and run.seed == 1)
    record = folder.records([run])[run.run_id]
    alone = train(run.recipe(tmp_path / "alone"))
    losses = [entry["loss"] for entry in alone.history if "loss" in entry]
    assert [point["loss"] for point in record.metrics["curve"]] == losses
    assert record.metrics["kept_step"] == alone.metrics["kept_step"]
    assert record.metrics["num_trained"] == alone.metrics["num_trained"]
    assert record.metrics["validation"]["colors"]["acc_norm"] == alone.metrics["eval_acc_norm"]
    assert record.metrics["validation"]["colors"]["loss"] == alone.metrics["eval_loss"]
    items = load_examples(run.options["task"], "test")
    expected = summarize(score_examples(alone.model, alone.tokenizer, items, progress=False))
    assert record.metrics["test"]["colors"]["acc_norm"] == expected["acc_norm"]
    assert record.metrics["test"]["colors"]["acc"] == expected["acc"]


def test_a_second_run_does_nothing(finished):
    _, runs, folder, _, _ = finished
    before = {path: path.stat().st_mtime_ns for path in folder.path.glob("*.json")}
    lines = []
    assert run_study(runs, folder, tell=lines.append) == 0
    assert lines == []
    assert {path: path.stat().st_mtime_ns for path in folder.path.glob("*.json")} == before


def test_plan_and_status_count(finished, study_values, tmp_path):
    spec, runs, folder, _, _ = finished
    status = find_status(runs, folder, on_gpu=False)
    assert "5 done, 0 running, 0 failed, 0 missing" in status_text(spec, status, folder, 1)
    more = read_spec({**study_values, "seeds": [0, 1, 2]})
    status = find_status(make_runs(more), folder, on_gpu=False)
    assert (status.count("done"), status.count("missing")) == (5, 2)
    assert {status.estimates[run.run_id].source for run in status.runs} == {"records"}
    text = plan_text(more, status, folder, 2)
    assert "2 of 7 runs are missing" in text
    assert "with 2 workers on a CPU" in text
    assert "rule of thumb" not in text
    elsewhere = StudyFolder(tmp_path / "other")
    status = find_status(runs, elsewhere, on_gpu=False)
    text = plan_text(spec, status, elsewhere, 1)
    assert "by rule of thumb: 6 operations" in text
    assert "with 1 worker on a CPU of this machine\n" in text


def test_a_broken_record_is_named(finished, tmp_path):
    _, runs, _, _, _ = finished
    folder = StudyFolder(tmp_path)
    folder.record(runs[0]).write_text("{")
    with pytest.raises(GraphLoraError, match=r"broken JSON.*; delete the file, and the run is done again"):
        find_status(runs, folder, on_gpu=False)


def test_a_failure_is_recorded_the_others_go_on_and_it_is_tried_again_on_request(study_values, tmp_path):
    values = changed(
        study_values, variants={"broken": {"method": "lora", "target_modules": "nothing_here"}}, seeds=[0]
    )
    spec = read_spec(values)
    runs, folder, lines = make_runs(spec), StudyFolder(tmp_path / "r"), []
    assert run_study(runs, folder, tell=lines.append) == 1
    assert sum("done" in line for line in lines) == 3
    failed = next(run for run in runs if run.variant == "broken")
    record = RunRecord.read(folder.failure(failed))
    assert (record.kind, record.variant, record.seed) == ("study-failure", "broken", 0)
    assert "nothing_here" in record.metrics["error"]
    status = find_status(runs, folder, on_gpu=False)
    assert status.count("failed") == 1
    assert "failed: tiny: broken on colors, seed 0: " in status_text(spec, status, folder, 1)
    assert run_study(runs, folder, tell=lines.append) == 1
    assert len(lines) == 4
    assert run_study(runs, folder, retry_failed=True, tell=lines.append) == 1
    assert len(lines) == 5


def test_a_loss_that_is_not_finite_fails_one_run_and_the_next_is_right(study_values, tmp_path, finished):
    wild = {"hot": {"method": "lora", "learning_rate": 1e30, "max_grad_norm": 0}}
    values = {**study_values, "variants": {**wild, "lora": {"method": "lora"}}, "seeds": [1]}
    runs, folder = make_runs(read_spec(values)), StudyFolder(tmp_path / "r")
    assert run_study(runs, folder, tell=lambda line: None) == 1
    run = next(run for run in runs if run.variant == "lora")
    same = finished[2].records([run])[run.run_id]
    assert folder.records([run])[run.run_id].metrics["curve"] == same.metrics["curve"]


def test_tuning_leaves_the_test_split_alone(study_values, tmp_path, monkeypatch):
    seen = []

    def spied(spec, split, **options):
        seen.append(split)
        return load_examples(spec, split, **options)

    for module in ("tasks.catalog", "study.plan", "training.run_data"):
        monkeypatch.setattr(f"graphlora.{module}.load_examples", spied)
    runs = make_runs(read_spec({**study_values, "evaluate": "validation", "seeds": [0]}))
    folder = StudyFolder(tmp_path / "r")
    assert run_study(runs, folder, tell=lambda line: None) == 0
    assert seen
    assert "test" not in seen
    for record in folder.records(runs).values():
        assert "test" not in record.metrics
        assert record.metrics["score"] == record.metrics["validation"]["colors"]["acc_norm"]


def test_matched_lora_trains_as_many_parameters(study_values, tmp_path):
    target = {"num_experts": 8, "router_hidden_size": 64}
    matched = {"method": "lora", "match_parameters": "graphlora"}
    runs = make_runs(
        read_spec({**study_values, "variants": {"m": matched, "graphlora": target}, "seeds": [0]})
    )
    folder = StudyFolder(tmp_path / "r")
    assert run_study(runs, folder, tell=lambda line: None) == 0
    records = {record.variant: record for record in folder.records(runs).values()}
    config, wanted = records["m"].config, records["graphlora"].metrics["num_trained"]
    per_rank = records["m"].metrics["num_trained"] / config["r"]
    assert abs(records["m"].metrics["num_trained"] - wanted) <= per_rank / 2
    assert config["lora_alpha"] / config["r"] == 4 / 2


def test_a_study_keeps_adapters_where_it_says_so(study_values, tmp_path):
    runs = make_runs(read_spec({**study_values, "keep_adapters": True, "seeds": [0]}))
    folder = StudyFolder(tmp_path / "r")
    run_study(runs[:2], folder, tell=lambda line: None)
    place = folder.adapter(runs[1])
    assert place is not None
    assert {path.name for path in place.iterdir()} == {
        "adapter_model.safetensors",
        "adapter_config.json",
        "config.yaml",
    }


def test_several_tasks_and_a_mixture_are_scored_by_their_parts(study_values, colors, tmp_path):
    other = tmp_path / "other.jsonl"
    other.write_text(colors.read_text().replace("What color", "Which color"))
    tasks = [{"name": "both", "task": {str(colors): 1.0, str(other): 1.0}}]
    runs = make_runs(read_spec({**study_values, "tasks": tasks, "seeds": [0]}))[:2]
    folder = StudyFolder(tmp_path / "r")
    assert run_study(runs, folder, tell=lambda line: None) == 0
    metrics = folder.records(runs)[runs[1].run_id].metrics
    assert set(metrics["test"]) == set(metrics["validation"]) == {"colors", "other"}
    assert metrics["score"] == pytest.approx(sum(part["acc_norm"] for part in metrics["test"].values()) / 2)


def test_a_run_goes_on_from_its_checkpoint(study_values, tmp_path, finished, monkeypatch):
    run = next(run for run in finished[1] if run.variant == "graphlora" and run.seed == 1)
    from graphlora.training.trainer import AdapterTrainer

    original, steps = AdapterTrainer.training_step, []

    def stopped(self, *args, **kwargs):
        steps.append(self.state.global_step)
        if len(steps) == 4:
            raise KeyboardInterrupt
        return original(self, *args, **kwargs)

    monkeypatch.setattr(AdapterTrainer, "training_step", stopped)
    with pytest.raises(KeyboardInterrupt):
        execute(run, KeptWorkbench(), tmp_path / "work")
    record = execute(run, KeptWorkbench(), tmp_path / "work")
    assert steps == [0, 1, 2, 3, 2, 3, 4, 5]
    undisturbed = finished[2].records([run])[run.run_id]
    for name in ("curve", "test", "validation", "routing", "train_loss", "kept_step", "score"):
        assert record.metrics[name] == undisturbed.metrics[name], name


def test_checkpoints_between_log_lines_are_not_gone_on_from(study_values, tmp_path):
    from graphlora.study.execute import _drop_uneven_checkpoints

    policy = {"logging_steps": 4, "max_steps": 3, "eval_steps": 1}
    run = make_runs(read_spec(changed(study_values, policy=policy, seeds=[0])))[1]
    train(run.recipe(tmp_path / "work"))
    end = tmp_path / "work" / "checkpoints" / "checkpoint-3"
    _drop_uneven_checkpoints(tmp_path / "work")
    assert end.is_dir(), "nothing is left to log after the end"
    shutil.rmtree(end)
    _drop_uneven_checkpoints(tmp_path / "work")
    assert not (tmp_path / "work").exists()


def test_a_run_that_ended_before_its_record_was_written_trains_no_more(study_values, tmp_path, monkeypatch):
    policy = {"logging_steps": 4, "max_steps": 3, "eval_steps": 1}
    run = make_runs(read_spec(changed(study_values, policy=policy, seeds=[0])))[1]
    train(run.recipe(tmp_path / "work"))
    undisturbed = execute(run, KeptWorkbench(), tmp_path / "other")
    monkeypatch.setattr(AdapterTrainer, "training_step", None)
    record = execute(run, KeptWorkbench(), tmp_path / "work")
    for name in ("curve", "test", "validation", "train_loss", "kept_step", "score"):
        assert record.metrics[name] == undisturbed.metrics[name], name


def test_a_changed_base_model_is_found_out(study_values):
    run = make_runs(read_spec(study_values))[1]
    recipe, workbench = run.recipe(), KeptWorkbench()
    base = workbench.base_model(recipe, torch.float32, torch.device("cpu"))
    before = fingerprint(base)
    adapted = add_adapter(base, recipe)
    assert fingerprint(base) != before
    workbench.put_back(adapted)
    assert workbench.base_model(recipe, torch.float32, torch.device("cpu")) is base
    assert fingerprint(base) == before
    adapted = add_adapter(base, recipe)
    with torch.no_grad():
        base.model.embed_tokens.weight[5, 3] += 1
    with pytest.raises(GraphLoraError, match="changed the weights or modules of its base model"):
        workbench.put_back(adapted)
    assert workbench.base_model(recipe, torch.float32, torch.device("cpu")) is not base


def test_ties_and_overlap_by_hand(study_values):
    probs = torch.tensor([[0.4, 0.3, 0.3, 0.0], [0.5, 0.3, 0.1, 0.1], [0.25, 0.25001, 0.24999, 0.25]])
    assert tie_rate(probs, 2) == pytest.approx(2 / 3)
    assert tie_rate(probs, 4) is None
    recipe = Recipe.from_dict(make_runs(read_spec(study_values))[2].options | {"output_dir": "x"})
    base = load_base_model(recipe.model, torch.float32)
    model = add_adapter(base, recipe)
    generator = torch.Generator().manual_seed(0)
    updates: dict[str, list[torch.Tensor]] = {}
    for name, module in model.named_modules():
        if type(module).__name__ == "LoraExperts":
            with torch.no_grad():
                module.lora_B.copy_(torch.randn(module.lora_B.shape, generator=generator))
            block = name.split("base_model.model.")[1].split(".graphlora")[0]
            parts = [(B @ A).detach().flatten() for A, B in zip(module.lora_A, module.lora_B, strict=True)]
            updates.setdefault(block, [torch.empty(0)] * len(parts))
            updates[block] = [torch.cat(pair) for pair in zip(updates[block], parts, strict=True)]
    for block, found in expert_overlap(model).items():
        vectors = torch.nn.functional.normalize(torch.stack(updates[block]), dim=1)
        cosines = (vectors @ vectors.T).abs()
        expected = (cosines.sum() - cosines.trace()) / (len(vectors) * (len(vectors) - 1))
        assert found == pytest.approx(float(expected), abs=1e-5)


def test_names_of_methods_and_points_of_curves():
    options = {"model": "m", "task": "t", "output_dir": "o"}
    assert method_name(Recipe(**options)) == "graphlora"
    assert method_name(Recipe(**options, preset="released")) == "released"
    assert method_name(Recipe(**options, method="lora", use_dora=True)) == "dora"
    assert method_name(Recipe(**options, method="lora", loraplus_lr_ratio=4.0)) == "loraplus"
    log = [
        {"step": 1, "loss": 2.0},
        {"step": 2, "loss": 1.0},
        {"step": 2, "eval_loss": 3.0, "eval_runtime": 1.0},
    ]
    assert curve(log) == [{"step": 1, "loss": 2.0}, {"step": 2, "loss": 1.0, "eval_loss": 3.0}]
    assert json.loads(json.dumps(curve(log))) == curve(log)
