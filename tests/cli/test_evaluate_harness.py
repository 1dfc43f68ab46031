"""`graphlora evaluate --harness lm-eval` as a process, and what it refuses."""

import json
import sys
from importlib.util import find_spec

import pytest

from graphlora.records import RunRecord

needs_harness = pytest.mark.skipif(find_spec("lm_eval") is None, reason="needs lm-evaluation-harness")
COLORS = ("red", "blue", "green sea", "black")


@pytest.fixture(scope="module")
def data_dir(tmp_path_factory):
    """ARC-Easy and Social IQa rows, as the hub has them."""
    folder = tmp_path_factory.mktemp("hub")
    rows = {
        "arc_easy/test": [
            {
                "id": f"arc-{n}",
                "question": f"What color is the sky {n}?",
                "choices": {"text": list(COLORS[: 3 + n % 2]), "label": list("ABCD"[: 3 + n % 2])},
                "answerKey": "ABC"[n % 3],
            }
            for n in range(10)
        ],
        "social_iqa/validation": [
            {
                "context": f"The rose is red {n}.",
                "question": "What color?",
                **{f"answer{letter}": COLORS[(place + n) % 4] for place, letter in enumerate("ABC")},
                "label": str(1 + n % 3),
            }
            for n in range(10)
        ],
    }
    for name, content in rows.items():
        path = folder / f"{name}.jsonl"
        path.parent.mkdir()
        path.write_text("".join(json.dumps(row) + "\n" for row in content))
    return folder


@needs_harness
def test_the_harness_scores_an_adapter_as_graphlora_does(command, adapter, data_dir, tmp_path):
    done = command(
        "evaluate", adapter, "--task", "arc_easy", "social_iqa", "--data-dir", data_dir, "--dtype", "float32",
        "--harness", "lm-eval", "--batch_size", 3, "--compare", "--with_base", "--output", tmp_path / "record.json",
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    assert done.stdout.count("picks differ on 0 of 10 items") == 4
    record = RunRecord.read(tmp_path / "record.json")
    assert record.kind == "evaluation"
    assert record.provenance["versions"]["lm_eval"].startswith("0.4.")
    assert record.config["harness"] == "lm-eval"
    assert record.data_hash is not None
    for task in ("arc_easy", "social_iqa"):
        for name in (task, f"{task} (base)"):
            theirs, ours = record.metrics[name], record.metrics[f"{name} (graphlora)"]
            assert theirs["n"] == ours["n"] == 10
            for metric in ("acc", "acc_norm"):
                assert theirs[metric] == pytest.approx(ours[metric], abs=1e-12)
                assert theirs[f"{metric}_stderr"] == pytest.approx(ours[f"{metric}_stderr"], abs=1e-12)
            assert theirs["comparison"]["different"] == []
            assert theirs["comparison"]["largest_gap"] < 1e-4
        assert f"{task} (base) (graphlora)" in done.stdout


@needs_harness
def test_items_are_those_of_an_evaluation_without_the_harness(graphlora, adapter, data_dir, tmp_path):
    words = [
        "evaluate",
        adapter,
        "--task",
        "arc_easy",
        "--data-dir",
        data_dir,
        "--limit",
        6,
        "--dtype",
        "float32",
    ]
    records = {}
    for name, more in {"theirs": ["--harness", "lm-eval"], "ours": []}.items():
        code, _, error = graphlora(
            *words, *more, "--item_scores", tmp_path / f"{name}.jsonl", "--output", tmp_path / f"{name}.json"
        )
        assert code == 0, error
        records[name] = RunRecord.read(tmp_path / f"{name}.json")
    theirs, ours = (
        [json.loads(line) for line in (tmp_path / f"{name}.jsonl").read_text().splitlines()]
        for name in ("theirs", "ours")
    )
    assert len(theirs) == 6
    for one, other in zip(theirs, ours, strict=True):
        assert one.pop("scores") == pytest.approx(other.pop("scores"), abs=1e-4)
        assert one == other
    assert records["theirs"].data_hash == records["ours"].data_hash
    assert not {"harness", "batch_size", "compare"} & set(records["ours"].config)


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["--compare"], "--compare needs --harness lm-eval"),
        (["--batch-size", 0], "--batch_size needs --harness lm-eval"),
        (["--harness", "lm-eval", "--scoring", "letter"], "scores cloze only; --scoring is 'letter'"),
        (["--harness", "other"], "--harness is 'other'"),
    ],
)
def test_options_that_do_not_fit_are_refused(graphlora, tiny_model, data_dir, words, message):
    code, _, error = graphlora("evaluate", tiny_model, "--task", "arc_easy", "--data-dir", data_dir, *words)
    assert code == 2
    assert message in error


def test_a_missing_harness_is_one_line_with_the_command(graphlora, tiny_model, monkeypatch):
    monkeypatch.setitem(sys.modules, "lm_eval", None)
    code, _, error = graphlora("evaluate", tiny_model, "--task", "arc_easy", "--harness", "lm-eval")
    assert code == 2
    assert error.endswith("which is not installed; pip install 'graphlora[harness]'")


@needs_harness
def test_a_missing_file_is_one_line(graphlora, tiny_model, data_dir):
    code, _, error = graphlora(
        "evaluate", tiny_model, "--task", "piqa", "--data-dir", data_dir, "--harness", "lm-eval"
    )
    assert code == 2
    assert "has no validation file" in error


@needs_harness
def test_a_batch_of_nothing_is_refused(graphlora, tiny_model, data_dir):
    words = ["--task", "arc_easy", "--data-dir", data_dir, "--harness", "lm-eval", "--batch_size", 0]
    code, _, error = graphlora("evaluate", tiny_model, *words)
    assert code == 2
    assert "batch_size is 0" in error
