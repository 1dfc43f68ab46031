"""The commands of docs/findings.md make the runs that have records; what it lists as not run has none."""

import re
import shlex

import pytest
from findings import PAGE, ROOT, records_of

from graphlora.study.plan import make_runs
from graphlora.study.spec import Overrides, load_spec

STUDIES = ("table1_small", "table1_small_more", "graph_small", "edges_small", "tuning")
RATE = 11.5 / 105  # minutes per run


def commands():
    """Words after `graphlora study run` of each command, with lines that go on joined."""
    found = [line for block in PAGE.split("```")[1::2] for line in block.replace("\\\n", " ").splitlines()]
    return [shlex.split(line)[3:] for line in found if line.startswith("graphlora study run")]


def runs_of(words):
    """The runs of a command, and the name of its study."""
    name, *rest = words
    given = {}
    for word in rest:
        if word.startswith("--"):
            option = word.removeprefix("--")
            given[option] = []
        else:
            given[option].append(word)
    assert {"model", "data_dir"} <= set(given), words
    seeds = tuple(int(seed) for seed in ",".join(given.get("seeds", [])).split(",") if seed)
    overrides = Overrides(
        models=tuple(given["model"]),
        tasks=tuple(given.get("task", ())),
        settings=tuple(given.get("set", ())),
        only=tuple(given.get("only", ())),
        seeds=seeds,
    )
    return make_runs(load_spec(str(ROOT / name) if "/" in name else name, overrides))


@pytest.mark.parametrize("study", STUDIES)
def test_the_commands_make_exactly_the_runs_that_are_recorded(study):
    runs = {run.run_id for words in commands() if words[0] == study for run in runs_of(words)}
    assert runs == {path.stem for path in (ROOT / "results" / study).glob("*.json")}


def test_a_study_given_by_its_path_makes_the_same_runs():
    (words,) = (words for words in commands() if "/" in words[0])
    assert {run.run_id for run in runs_of(words)} == {
        path.stem for path in (ROOT / "results" / "table1_small_more").glob("*.json")
    }


def test_what_was_not_run_is_counted_right():
    part = PAGE.split("\n## Not run\n")[1].split("\n## ")[0]
    rows = re.findall(r"^\| (.+) \| (\d+) \| (\d+) \|$", part, re.MULTILINE)
    table1 = load_spec("table1_small")
    three, five = len(table1.tasks), len(table1.seeds)
    left = {v.name for v in table1.variants} - set(records_of("table1_small"))
    second = set(records_of("table1_small")) - set(records_of("table1_small_more"))
    tuning = load_spec("tuning")
    tuned = len(tuning.variants) * len(tuning.seeds) * len(tuning.tasks)
    done = sum(len(records) for variant, records in records_of("tuning").items() if variant != "base")
    counts = {
        "DoRA": len(left) * three * five,
        "the presets": len(second) * 2 * five,
        "each method": 7 * three * five,
        "`tuning`": tuned - done,
        "`ablation`": 5 * three * five,
    }
    for name in ("sensitivity", "efficiency"):
        counts[f"`{name}`"] = sum(run.seed is not None for run in make_runs(load_spec(name)))
    assert len(rows) == len(counts)
    for what, runs, minutes in rows:
        (expected,) = (count for label, count in counts.items() if what.startswith(label))
        assert int(runs) == expected, what
        assert int(minutes) == round(expected * RATE), what
    assert {v.name for v in load_spec("ablation").variants} - set(records_of("table1_small")) == {
        f"graphlora_{change}"
        for change in ("no_losses", "no_self_term", "no_centering", "free_sigma", "fixed_sigma")
    }
    assert "by the rule of `graphlora study plan` for a GPU | 855 |" in part
    assert sum(run.seed is not None for run in make_runs(load_spec("table1"))) == 855


def test_links_within_the_page_lead_somewhere():
    titles = re.findall(r"^#+ (.+)$", PAGE, re.MULTILINE)
    anchors = {re.sub(r"[^\w\- ]", "", title.lower()).replace(" ", "-") for title in titles}
    assert len(anchors) == len(titles)
    linked = set(re.findall(r"\]\(#([^)]+)\)", PAGE))
    assert linked and linked <= anchors
