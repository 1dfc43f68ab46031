"""Which runs a study has, and that their names are their configurations."""

import json

import pytest

from graphlora.errors import GraphLoraError
from graphlora.study import presets
from graphlora.study.plan import Run, make_runs, missing_data
from graphlora.study.spec import read_spec

VALUES = {
    "study": "mine",
    "models": [{"name": "small", "model": "org/small"}],
    "tasks": ["quiz", {"name": "short", "task": "quiz", "policy": {"max_steps": 5}}],
    "seeds": [0, 1],
    "policy": {"max_steps": 10, "training_args": {"use_cpu": True}},
    "variants": {
        "lora": {"method": "lora", "match_parameters": "graphlora"},
        "graphlora": {"training_args": {"adam_beta2": 0.9}},
    },
}


def runs_of(**changes) -> list[Run]:
    return make_runs(read_spec({**VALUES, **changes}))


def ids(runs, **which) -> set[str]:
    return {run.run_id for run in runs if all(getattr(run, name) == value for name, value in which.items())}


def test_the_base_model_comes_first_then_seed_by_seed():
    runs = runs_of()
    assert [(run.variant, run.task, run.seed) for run in runs] == [
        ("base", "quiz", None),
        ("base", "short", None),
        *[
            (variant, task, seed)
            for seed in (0, 1)
            for task in ("quiz", "short")
            for variant in ("lora", "graphlora")
        ],
    ]
    assert len(ids(runs)) == len(runs)
    assert all(Run(**run.to_dict()) == run for run in runs)


def test_policy_task_and_variant_are_joined():
    run = next(run for run in runs_of() if (run.variant, run.task, run.seed) == ("graphlora", "short", 1))
    recipe = run.recipe()
    assert recipe.max_steps == 5
    assert recipe.seed == 1
    assert recipe.training_args == {"use_cpu": True, "adam_beta2": 0.9}
    assert run.policy == {"max_steps": 5, "training_args": {"use_cpu": True}}


def test_the_name_of_a_run_is_its_configuration_not_its_place(tmp_path):
    runs = runs_of()
    moved = runs_of(models=[{"name": "small", "model": str(tmp_path)}], data_dir=str(tmp_path))
    assert ids(moved) == ids(runs)
    assert ids(runs_of(seeds=[1, 0, 2])) > ids(runs)
    assert not ids(runs_of(study="other")) & ids(runs)


def test_another_policy_is_another_run_but_leaves_the_base_model():
    before, after = runs_of(), runs_of(policy={**VALUES["policy"], "learning_rate": 1e-3})
    assert ids(before, variant="base") == ids(after, variant="base")
    assert not ids(before, seed=0) & ids(after, seed=0)


def test_a_variant_changes_its_own_runs_and_those_matched_to_it():
    third = {**VALUES["variants"], "other": {"r": 2}}
    before, after = runs_of(variants=third), runs_of(variants={**third, "graphlora": {"num_experts": 4}})
    assert ids(before, variant="other") == ids(after, variant="other")
    assert not ids(before, variant="lora") & ids(after, variant="lora")


def test_a_preset_that_changes_makes_new_runs(monkeypatch):
    before = runs_of()
    known = presets._presets()
    monkeypatch.setattr(
        presets, "_presets", lambda: {**known, "graphlora": {**known["graphlora"], "edge_density": 0.3}}
    )
    assert not ids(before, variant="graphlora") & ids(runs_of(), variant="graphlora")


@pytest.mark.parametrize(
    ("changes", "line"),
    [
        ({"policy": {"learning_rate": "fast"}}, "learning_rate is 'fast'; expected float"),
        ({"policy": {"warmup_ratio": 2}}, "warmup_ratio is 2"),
        (
            {"variants": {"a": {"preset": "graphlor"}}},
            "variant a: preset 'graphlor' is unknown; did you mean",
        ),
        (
            {"evaluate": "validation", "policy": {"eval_strategy": "no"}},
            "evaluate is validation, but eval_strategy",
        ),
    ],
)
def test_options_that_make_no_recipe_are_told_at_once(changes, line):
    with pytest.raises(GraphLoraError) as caught:
        runs_of(**changes)
    assert line in str(caught.value)


def test_data_are_looked_at_before_the_first_run(tmp_path):
    missing_data(runs_of())
    nowhere = [{"name": "small", "model": str(tmp_path / "nowhere")}]
    with pytest.raises(GraphLoraError, match=r"no model at .*nowhere; check the path"):
        missing_data(runs_of(models=nowhere))
    with pytest.raises(GraphLoraError, match="unknown task 'quizz'"):
        missing_data(runs_of(tasks=["quizz"]))
    texts = tmp_path / "texts.jsonl"
    splits = ["test"] * 3 + ["train"] * 30
    rows = [{"prompt": f"a{n}", "completion": " b", "split": split} for n, split in enumerate(splits)]
    texts.write_text("".join(json.dumps(row) + "\n" for row in rows))
    with pytest.raises(GraphLoraError, match="has no choices to score; set metric: loss"):
        missing_data(runs_of(tasks=[str(texts)]))
    missing_data(runs_of(tasks=[str(texts)], metric="loss", evaluate="validation"))
