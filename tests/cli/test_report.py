"""`graphlora report`: what it writes and says, and its mistakes in one line."""

import subprocess
import sys

import pytest
from study_records import study_record, write_records


@pytest.fixture
def results(tmp_path):
    records = [
        study_record(name, "quiz", seed, 50 + seed) for name in ("graphlora", "lora") for seed in range(2)
    ]
    records.append(study_record("lora", "quiz", 2, 50, dirty=True))
    return write_records(records, tmp_path / "results")


def test_a_report_lies_beside_its_records(graphlora, results):
    (results / "table1" / "cut.json").write_text("{")
    code, out, error = graphlora("report", results)
    assert code == 0
    assert "table1: 4 records" in out
    assert "1 record from a tree with uncommitted changes left out (--include-dirty keeps them)." in out
    assert "skipped:" in error
    assert "cut.json: broken JSON" in error
    names = {path.name for path in (results / "report").iterdir()}
    assert names == {"report.html", "report.md", "figures", "tables"}
    assert "cut.json" in (results / "report" / "report.html").read_text(encoding="utf-8")


def test_options_reach_the_report(graphlora, results, tmp_path):
    words = [
        "--include-dirty",
        "--reference",
        "lora",
        "--format",
        "md",
        "--title",
        "Mine",
        "--output",
        tmp_path / "o",
    ]
    code, out, _ = graphlora("report", results, "--study", "table1", *words)
    assert code == 0
    assert "table1: 5 records" in out
    text = (tmp_path / "o" / "report.md").read_text(encoding="utf-8")
    assert text.startswith("# Mine\n")
    assert "Compared with LoRA." in text
    assert "†" in text


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["--reference", "dora"], "table1 has no variant 'dora' to compare with; it has: graphlora, lora"),
        (["--study", "table2"], "there is no study 'table2' in"),
        (["--format", "pdf"], "unknown format pdf; choose among html, md, latex, png, svg"),
        (["--refrence", "lora"], "unknown argument --refrence; did you mean '--reference'?"),
    ],
)
def test_mistakes_are_one_line(graphlora, results, words, message):
    code, _, error = graphlora("report", results, *words)
    assert code == 2
    assert message in error


def test_a_folder_without_records_is_named(graphlora, tmp_path):
    code, _, error = graphlora("report", tmp_path)
    assert code == 2
    assert error == (
        f"graphlora: error: there are no records of a study in {tmp_path}; make some with: graphlora study run"
    )


def test_the_command_needs_no_torch(results):
    code = (
        "import sys; sys.modules['torch'] = None\n"
        "from graphlora.cli.main import main\n"
        f"assert main(['report', {str(results)!r}]) == 0"
    )
    subprocess.run([sys.executable, "-c", code], check=True, capture_output=True)
