"""docs/evaluation.md says of lm-evaluation-harness what the committed record says."""

import re
import shlex
from pathlib import Path

from graphlora.cli.evaluate import build_parser
from graphlora.records import RunRecord

ROOT = Path(__file__).parents[2]
PAGE = (ROOT / "docs" / "evaluation.md").read_text(encoding="utf-8")
RECORD = RunRecord.read(ROOT / "results" / "harness" / "lm_eval.json")
TASKS = {"ARC-Easy": "arc_easy", "SIQA": "social_iqa"}


def test_the_table_is_that_of_the_record():
    rows = re.findall(
        r"^\| (base|with [^|]+) \| ([^|]+) \| (.+) \| (.+) \| (.+) \| (\d+) \|$", PAGE, re.MULTILINE
    )
    assert len(rows) == len(RECORD.metrics) / 2 == 4
    for model, task, acc, acc_norm, gap, different in rows:
        name = TASKS[task] + (" (base)" if model == "base" else "")
        theirs, ours = RECORD.metrics[name], RECORD.metrics[f"{name} (graphlora)"]
        assert (acc, acc_norm) == (f"{theirs['acc']:.2f}", f"{theirs['acc_norm']:.2f}")
        assert (theirs["acc"], theirs["acc_norm"]) == (ours["acc"], ours["acc_norm"])
        assert gap == f"{theirs['comparison']['largest_gap']:.1e}"
        assert int(different) == len(theirs["comparison"]["different"]) == 0
        assert theirs["n"] == ours["n"] == 50
    assert f"lm-eval {RECORD.provenance['versions']['lm_eval']} on SmolLM2-135M-Instruct" in PAGE
    assert f"commit\n{RECORD.provenance['commit'][:7]}" in PAGE and not RECORD.provenance["dirty"]


def test_the_command_is_that_of_the_record():
    (block,) = (part for part in PAGE.split("```")[1::2] if "results/harness" in part)
    arguments = build_parser().parse_args(shlex.split(block.replace("\\\n", " "))[2:])
    given = {key: value for key, value in arguments.as_dict().items() if key in RECORD.config}
    assert given == RECORD.config
