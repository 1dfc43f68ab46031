"""docs/findings.md says what the committed records say."""

import json
import re
from collections import defaultdict
from pathlib import Path
from statistics import fmean

import pytest

ROOT = Path(__file__).parents[2]
PAGE = (ROOT / "docs" / "findings.md").read_text(encoding="utf-8")
ROWS = dict(re.findall(r"^\| `(\w+)` \| ([\d.].*) \|$", PAGE, re.MULTILINE))


@pytest.fixture(scope="module")
def records():
    found = [
        json.loads(path.read_text()) for path in sorted((ROOT / "results" / "table1_small").glob("*.json"))
    ]
    by_variant = defaultdict(list)
    for record in found:
        by_variant[record["variant"]].append(record)
    return by_variant


def test_every_method_has_five_seeds_of_three_tasks_from_one_clean_commit(records):
    assert set(ROWS) == set(records) - {"base"}
    for variant in ROWS:
        runs = {(record["metrics"]["task"], record["seed"]) for record in records[variant]}
        assert len(runs) == len(records[variant]) == 15, variant
    sources = {(r["provenance"]["commit"], r["provenance"]["dirty"]) for rs in records.values() for r in rs}
    assert [(commit[:7], dirty) for commit, dirty in sources] == [("a3e3797", False)]


@pytest.mark.parametrize("variant", ROWS)
def test_the_table_is_that_of_the_records(records, variant):
    trained, accuracy, difference, *_, worst, dead = (cell.strip() for cell in ROWS[variant].split("|"))
    scores = {(r["metrics"]["task"], r["seed"]): 100 * r["metrics"]["score"] for r in records[variant]}
    mine = {(r["metrics"]["task"], r["seed"]): 100 * r["metrics"]["score"] for r in records["graphlora"]}
    assert accuracy == f"{fmean(scores.values()):.2f}"
    assert trained == f"{records[variant][0]['metrics']['num_trained'] / 1e6:.1f}"
    if variant != "graphlora":
        gap = fmean(scores[key] - mine[key] for key in mine)
        assert float(difference.split(",")[0]) == pytest.approx(gap, abs=0.0051)
    blocks = [block for r in records[variant] for block in r["metrics"].get("routing", {}).values()]
    if blocks:
        assert worst == f"{max(block['load_cv'] for block in blocks):.2f}"
        assert float(dead) == pytest.approx(sum(block["dead_experts"] for block in blocks) / 15, abs=0.051)


def test_the_default_keeps_its_balance(records):
    """At most 0.25 in every block of every run, and no dead expert."""
    blocks = [block for r in records["graphlora"] for block in r["metrics"]["routing"].values()]
    assert len(blocks) == 15 * 30
    assert max(block["load_cv"] for block in blocks) <= 0.25
    assert not any(block["dead_experts"] for block in blocks)
