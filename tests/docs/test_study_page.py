"""docs/study.md names keys, studies and options that exist, and its example is a study."""

import re
from pathlib import Path

import pytest

from graphlora.cli import report
from graphlora.cli.parsing import option_names, underscored
from graphlora.cli.study import build_parser
from graphlora.study.estimate import Estimator
from graphlora.study.plan import make_runs
from graphlora.study.spec import KEYS, Overrides, load_spec, shipped_studies

PAGE = (Path(__file__).parents[2] / "docs" / "study.md").read_text(encoding="utf-8")


def test_all_keys_and_no_others_are_explained():
    table = PAGE.split("## The keys")[1].split("\n## ")[0]
    assert set(re.findall(r"^\| `(\w+)` \|", table, re.MULTILINE)) == set(KEYS)


def test_all_shipped_studies_are_listed():
    table = PAGE.split("## Does GraphLoRA")[0]
    assert set(re.findall(r"^\| `(\w+)` \|", table, re.MULTILINE)) == set(shipped_studies())


def test_options_exist():
    named = set(underscored(re.findall(r"--[a-z][a-z_-]+", PAGE)))
    assert named <= option_names(build_parser()) | option_names(report.build_parser())


def test_the_hours_of_table1_are_those_of_the_plan():
    found = {}
    for model in ((), ("HuggingFaceTB/SmolLM2-135M-Instruct",)):
        runs = make_runs(load_spec("table1", Overrides(models=model)))
        for on_gpu in (False, True):
            hours = sum(Estimator(runs, {}, on_gpu=on_gpu)(run).seconds for run in runs) / 3600
            found[bool(model), on_gpu] = hours
    told = re.search(
        r"reads ([\d,]+) hours, and ([\d,]+) for .*?says (\d+) and (\d+)\.", " ".join(PAGE.split())
    )
    assert told
    told = [float(number.replace(",", "")) for number in told.groups()]
    assert told == pytest.approx([found[m, g] for g in (False, True) for m in (False, True)], rel=0.1)


def test_the_example_is_a_study(tmp_path):
    (tmp_path / "mine.yaml").write_text(PAGE.split("```yaml\n")[1].split("```")[0])
    spec = load_spec(str(tmp_path / "mine.yaml"))
    assert len(make_runs(spec)) == 1 + 3 * 5
