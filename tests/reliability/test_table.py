"""The table says what the records say, and a promise without a record is no success."""

import json
import subprocess
import sys
from pathlib import Path

import pytest
from reliability.__main__ import BEGIN, END, NOT_RUN, main, table
from reliability.promises import PROMISES
from reliability.record import read_records, write_record

from graphlora.errors import GraphLoraError

ROOT = Path(__file__).parents[2]
NAME = PROMISES[0].name


def record(folder: Path, name: str = NAME, figure: str = "3 of 3 | same") -> Path:
    return write_record(name, "It holds.", "tests/test_it.py::test_it", figure, {"num": 3}, folder=folder)


def row_of(text: str, piece: str) -> str:
    return next(line for line in text.splitlines() if piece in line)


def test_a_promise_without_a_record_was_not_run(tmp_path):
    assert table({}).count(NOT_RUN) == len(PROMISES)
    record(tmp_path)
    text = table(read_records(tmp_path))
    assert text.count(NOT_RUN) == len(PROMISES) - 1
    assert r"3 of 3 \| same" in row_of(text, "It holds.")


def test_a_record_says_command_commit_and_machine(tmp_path):
    found = json.loads(record(tmp_path).read_text())
    assert found["values"] == {"num": 3}
    assert found["command"]
    assert found["machine"].endswith("CPU cores")
    assert str(ROOT) not in json.dumps(found)


def test_a_record_that_nobody_expected_shows_too(tmp_path):
    record(tmp_path, "something_else", "found 7")
    assert "found 7" in table(read_records(tmp_path))


def test_the_command_renews_the_page_and_only_between_the_markers(tmp_path, capsys):
    record(tmp_path / "results")
    page = tmp_path / "page.md"
    page.write_text(f"before\n{BEGIN}\nold table\n{END}\nafter\n")
    assert main(["--results", str(tmp_path / "results"), "--page", str(page)]) == 0
    text = page.read_text()
    assert text.startswith("before\n")
    assert text.endswith("\nafter\n")
    assert "old table" not in text
    assert "It holds." in text
    assert "It holds." in capsys.readouterr().out


@pytest.mark.parametrize("text", ["{", "[]", '{"promise": "x"}', '{"promise": 3}'])
def test_a_broken_record_is_named(tmp_path, text):
    (tmp_path / "bad.json").write_text(text)
    with pytest.raises(GraphLoraError, match=r"bad\.json"):
        read_records(tmp_path)


def test_an_unknown_promise_is_named_with_the_known_ones(capsys):
    assert main(["run", "nonsense"]) == 2
    assert NAME in capsys.readouterr().err


def test_the_page_holds_the_table_of_the_records(tmp_path):
    page = (ROOT / "docs" / "reliability.md").read_text()
    assert table(read_records()) in page, "run python -m reliability"


def test_it_runs_as_a_module_and_imports_no_torch():
    code = "import sys, reliability.__main__; sys.exit('torch' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], cwd=ROOT).returncode == 0


def test_what_needs_gpus_is_told_and_not_run(tmp_path, capsys):
    by_hand = [promise for promise in PROMISES if promise.by_hand]
    assert {"two_gpus", "repeatable_gpu"} <= {promise.name for promise in by_hand}
    page = tmp_path / "page.md"
    page.write_text(f"{BEGIN}\n{END}\n")
    words = ["--results", str(tmp_path), "--page", str(page), "run", *(promise.name for promise in by_hand)]
    assert main(words) == 0
    out = capsys.readouterr().out
    for promise in by_hand:
        assert f"{promise.name}: needs GPUs; run there: {promise.by_hand}" in out
        assert promise.by_hand in row_of(page.read_text(), promise.text)
    assert not list(tmp_path.glob("*.json"))
