"""A study file becomes a spec, and each mistake in it one line with file and line."""

import subprocess
import sys

import pytest
import yaml

from graphlora.errors import GraphLoraError
from graphlora.study.plan import make_runs
from graphlora.study.spec import Overrides, load_spec, read_spec, shipped_studies
from graphlora.study.status import check_adapters

GOOD = """\
study: mine
models: [org/model-1B]
tasks:
  - arc_easy
  - {name: boolq, policy: {max_steps: 250}}
seeds: [0, 1]
policy:
  learning_rate: 1e-3
  max_steps: 100
variants:
  lora: {method: lora, r: 16}
  matched:
    method: lora
    match_parameters: graphlora
  graphlora:
    preset: graphlora
    load_decay: 0.5
"""


@pytest.fixture
def good(tmp_path):
    def write(old: str = "", new: str = ""):
        assert old in GOOD
        path = tmp_path / "mine.yaml"
        path.write_text(GOOD.replace(old, new, 1) if old else GOOD)
        return path

    return write


def test_a_study_is_read(good):
    spec = load_spec(str(good()))
    assert spec.study == "mine"
    assert [task.name for task in spec.tasks] == ["arc_easy", "boolq"]
    assert spec.tasks[1].policy == {"max_steps": 250}
    assert spec.seeds == (0, 1)
    assert spec.evaluate == "test"
    assert [variant.name for variant in spec.variants] == ["lora", "matched", "graphlora"]
    assert spec.variants[1].match_parameters == "graphlora"
    assert spec.variants[2].options == {"preset": "graphlora", "adapter_args": {"load_decay": 0.5}}


@pytest.mark.parametrize(
    ("old", "new", "line"),
    [
        (
            "study: mine",
            "study: mine\nvariant: {}",
            "mine.yaml:2: unknown key 'variant'; did you mean 'variants'?",
        ),
        ("seeds: [0, 1]", "seeds: []", "mine.yaml:6: the study has no seeds"),
        ("seeds: [0, 1]", "seeds: [3, 1, 3]", "mine.yaml:6: seeds has 3 twice"),
        ("seeds: [0, 1]", "seeds: [0, x]", "mine.yaml:6: the seed 'x' is no whole number"),
        ("seeds: [0, 1]", "seeds: 3", "mine.yaml:6: seeds is 3; give a list"),
        ("  - arc_easy", "  - boolq", "mine.yaml:5: tasks has boolq twice"),
        ("  - arc_easy", "  - {arc_easy: 1}", "mine.yaml:4: a task is"),
        ("  - arc_easy", "  - {task: {a: 1, b: 1}}", "mine.yaml:4: a mixture needs a name"),
        ("load_decay", "load_decai", "mine.yaml:17: unknown option 'load_decai'; did you mean 'load_decay'?"),
        ("learning_rate:", "learnin_rate:", "mine.yaml:8: unknown option 'learnin_rate'; did you mean"),
        ("    preset: graphlora", "    seed: 3", "mine.yaml:16: seed is not for a variant"),
        (
            "    preset: graphlora",
            "    train_limit: 3",
            "mine.yaml:16: train_limit would differ between variants",
        ),
        (
            "match_parameters: graphlora",
            "match_parameters: graphlor",
            "mine.yaml:14: no variant 'graphlor'; did you",
        ),
        ("    method: lora\n", "", "mine.yaml:13: match_parameters chooses the rank of method lora"),
        ("  lora: {", "  base: {", "mine.yaml:11: 'base' is the name of the base model's own record"),
        ("  lora: {", "  lo/ra: {", "mine.yaml:11: the name 'lo/ra' must be of letters"),
        ("  graphlora:", "  lora:", "mine.yaml:15: 'lora' is here a second time (first in line 11)"),
        ("study: mine", "study: [", "mine.yaml:3: broken YAML"),
        ("study: mine", "study: mine\nevaluate: tset", "mine.yaml:2: evaluate is 'tset'; choose one of test"),
        ("study: mine", "study: mine\ntest_limit: 0", "mine.yaml:2: test_limit is 0"),
    ],
)
def test_mistakes_are_named_with_their_line(good, old, new, line):
    with pytest.raises(GraphLoraError) as caught:
        load_spec(str(good(old, new)))
    assert line in str(caught.value)
    assert "\n" not in str(caught.value)


def test_a_missing_study_names_the_shipped_ones():
    with pytest.raises(GraphLoraError, match="no study 'tabel1'; did you mean 'table1'"):
        load_spec("tabel1")
    with pytest.raises(GraphLoraError, match=r"cannot read the study /nowhere/a\.yaml"):
        load_spec("/nowhere/a.yaml")


def test_the_command_line_wins(good):
    overrides = Overrides(
        models=("small=/models/a",),
        tasks=("boolq",),
        data_dir="/data",
        settings=("max_steps=7", "training_args.adam_beta2=0.9", "graphlora.r=4", "graphlora.load_decay=0.7"),
        only=("graphlora",),
        seeds=(5,),
    )
    spec = load_spec(str(good()), overrides)
    assert (spec.models[0].name, spec.models[0].path) == ("small", "/models/a")
    assert [task.name for task in spec.tasks] == ["boolq"]
    assert spec.policy["max_steps"] == 7
    assert spec.tasks[0].policy == {}
    assert spec.policy["training_args"] == {"adam_beta2": 0.9}
    assert spec.variants[0].options["r"] == 4
    assert spec.variants[0].options["adapter_args"] == {"load_decay": 0.7}
    assert len(spec.variants) == 1
    assert len(spec.all_variants) == 3
    assert spec.seeds == (5,)


@pytest.mark.parametrize(
    ("overrides", "line"),
    [
        (
            Overrides(only=("loro",)),
            "--only: no variant 'loro'; did you mean 'lora'?; the study has lora, matched",
        ),
        (Overrides(settings=("max_steps",)), "--set 'max_steps' is not key=value"),
        (
            Overrides(settings=("max_stepz=3",)),
            "--set max_stepz: unknown option 'max_stepz'; did you mean 'max_steps'",
        ),
        (Overrides(settings=("loro.r=3",)), "--set loro.r=3: no variant 'loro'; did you mean 'lora'"),
        (Overrides(seeds=(1, 1)), "seeds has 1 twice"),
    ],
)
def test_mistakes_on_the_command_line_are_named(good, overrides, line):
    with pytest.raises(GraphLoraError) as caught:
        load_spec(str(good()), overrides)
    assert line in str(caught.value)


@pytest.mark.parametrize(
    "name",
    [
        "ablation",
        "edges",
        "edges_small",
        "efficiency",
        "graph_small",
        "sensitivity",
        "smoke",
        "table1",
        "table1_small",
        "table1_small_more",
        "tuning",
    ],
)
def test_every_shipped_study_is_read(name):
    spec = load_spec(name)
    assert spec.study == name
    assert spec.description
    assert (spec.evaluate == "validation") == (name == "tuning")
    assert name in shipped_studies()


@pytest.mark.parametrize("name", sorted(shipped_studies()))
def test_the_variants_of_shipped_studies_are_adapters(name):
    spec = load_spec(name)
    check_adapters(spec, make_runs(spec))


def test_tuning_and_testing_share_no_seeds():
    assert not set(load_spec("tuning").seeds) & set(load_spec("table1").seeds)


def test_reading_a_study_imports_no_torch(good):
    code = (
        "import sys\nfrom graphlora.study.spec import load_spec\nfrom graphlora.study.plan import make_runs\n"
        "make_runs(load_spec('smoke'))\nassert not {'torch', 'peft', 'transformers'} & set(sys.modules)"
    )
    subprocess.run([sys.executable, "-c", code], check=True)


def test_plain_values_make_a_study_too():
    assert read_spec(yaml.safe_load(GOOD)).study == "mine"
    with pytest.raises(GraphLoraError, match=r"^study: unknown key 'x'"):
        read_spec({**yaml.safe_load(GOOD), "x": 1})
