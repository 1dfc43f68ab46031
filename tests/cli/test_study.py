"""`graphlora study` as a user meets it: the smoke study from plan to report, overrides, and mistakes."""

import json

import pytest
from reliability.tiny import make_model


@pytest.fixture(scope="module")
def roomy_model(tmp_path_factory):
    """A tiny model whose window holds the quiz's prompts."""
    return make_model(tmp_path_factory.mktemp("models") / "roomy", window=512)


@pytest.fixture
def smoke(roomy_model, tmp_path):
    """Words of the shipped smoke study with a tiny model."""
    settings = ["dtype=float32", "training_args.use_cpu=true"]
    return [
        "smoke", "--model", f"tiny={roomy_model}", "--output", tmp_path / "results", "--set", *settings,
    ]  # fmt: skip


def test_the_smoke_study_from_plan_to_report(graphlora, smoke, tmp_path):
    code, out, _ = graphlora("study", "plan", *smoke)
    assert code == 0
    assert "5 of 5 runs are missing: about" in out
    assert "score     acc_norm on the test split" in out
    code, out, _ = graphlora("study", "run", *smoke)
    assert code == 0
    assert "smoke: 5 of 5 runs to do" in out
    assert "[5/5, 0 s left] done tiny: graphlora on quiz, seed 1: acc_norm 0." in out
    assert "all 5 runs are done; next: graphlora study report smoke --output" in out
    folder = tmp_path / "results" / "smoke"
    records = [json.loads(path.read_text()) for path in folder.glob("*.json")]
    assert sorted(record["variant"] for record in records) == [
        "base",
        "graphlora",
        "graphlora",
        "lora",
        "lora",
    ]
    assert {record["metrics"]["test"]["quiz"]["num"] for record in records} == {40}
    code, out, _ = graphlora("study", "status", *smoke)
    assert code == 0
    assert "5 done, 0 running, 0 failed, 0 missing" in out
    code, out, _ = graphlora("study", "run", *smoke)
    assert "smoke: 0 of 5 runs to do" in out
    words = ["report", tmp_path / "results", "--study", "smoke", "--include_dirty", "--all_commits"]
    code, out, error = graphlora(*words, "--format", "md", "--output", tmp_path / "report")
    assert code == 0, error
    assert "smoke: 5 records" in out
    assert any("GraphLoRA" in path.read_text() for path in (tmp_path / "report").rglob("*.md"))


def test_only_some_variants_and_seeds(graphlora, smoke):
    code, out, _ = graphlora("study", "plan", *smoke, "--only", "lora", "--seeds", "4,5,6")
    assert code == 0
    assert "seeds     4, 5, 6" in out
    assert "4 of 4 runs are missing" in out
    assert "graphlora " not in out


def test_a_model_that_is_not_there_is_told_by_the_plan_and_before_a_run(graphlora, tmp_path):
    words = ["smoke", "--model", f"small={tmp_path / 'nowhere'}", "--output", tmp_path / "results"]
    code, out, _ = graphlora("study", "plan", *words)
    assert code == 0
    assert "nowhere; check the path: its size is taken from its name" in out
    code, _, error = graphlora("study", "run", *words)
    assert code == 2
    assert error.strip().splitlines()[-1].startswith("graphlora: error: no model at ")


def test_a_plan_says_that_the_size_of_a_hub_model_is_a_guess(graphlora, smoke):
    guess = "no folder nobody/nothing here, and the hub is not asked before a run: its size is taken from its name"
    assert guess in graphlora("study", "plan", "smoke", "--model", "nobody/nothing")[1]
    assert "its size" not in graphlora("study", "plan", *smoke)[1]


@pytest.mark.parametrize(
    ("words", "line"),
    [
        (
            ["study", "run", "smok"],
            "no study 'smok'; did you mean 'smoke'?; give a YAML file or one of ablation",
        ),
        (["study", "walk", "smoke"], "walk"),
        (["study", "run"], "see --help"),
        (["study", "plan", "smoke", "--only", "loro"], "--only: no variant 'loro'; did you mean 'lora'?"),
        (["study", "plan", "smoke", "--seeds", "a"], "--seeds is 'a'; give whole numbers, as in 0,1,2"),
        (["study", "plan", "smoke", "--set", "r"], "--set 'r' is not key=value; as in --set max_steps=100"),
        (["study", "plan", "smoke", "--set", "r=many"], "variant lora: r is 'many'; expected"),
        (
            ["study", "plan", "smoke", "--set", "lora.num_experts=4"],
            "num_experts has no meaning for method lora",
        ),
        (["study", "plan", "smoke", "--set", "graphlora.top_k=9"], "top_k=9 is larger than num_experts=4"),
        (["study", "run", "smoke", "--workers", "0"], "--workers is 0; give at least 1"),
        (["study", "run", "smoke", "--task", "quizz"], "unknown task 'quizz'"),
        (["study", "report", "smoke", "--output", "/nowhere"], "there is no folder /nowhere"),
    ],
)
def test_a_mistake_is_one_line_and_exit_code_2(graphlora, words, line):
    code, _, error = graphlora(*words)
    assert code == 2
    assert error.startswith("graphlora: error: ")
    assert line in error


def test_ray_that_is_not_installed_is_named(graphlora, smoke, monkeypatch):
    monkeypatch.setitem(__import__("sys").modules, "ray", None)
    code, _, error = graphlora("study", "run", *smoke, "--engine", "ray")
    assert code == 2
    assert "--engine ray needs Ray; pip install 'graphlora[ray]'" in error


def test_runs_that_failed_end_with_exit_code_2(graphlora, roomy_model, tmp_path):
    words = [
        "study",
        "run",
        "smoke",
        "--model",
        roomy_model,
        "--output",
        tmp_path,
        "--only",
        "lora",
        "--seeds",
        0,
    ]
    settings = ["dtype=float32", "training_args.use_cpu=true", "lora.target_modules=nothing_here"]
    code, out, error = graphlora(*words, "--set", *settings)
    assert code == 2
    assert "failed roomy: lora on quiz, seed 0: " in out
    assert "1 of 2 runs failed" in error
