"""docs/findings.md says what the committed records say."""

import json
import re
from collections import defaultdict
from pathlib import Path
from statistics import fmean, stdev

import pytest

ROOT = Path(__file__).parents[2]
PAGE = (ROOT / "docs" / "findings.md").read_text(encoding="utf-8")
EDGES = {
    "random (`graphlora`)": "graphlora",
    "none": "edgeless",
    "all": "complete",
    "between similar experts": "similarity",
}
CHANGES = {
    "learning rate 2e-3": "rate_2e-3",
    "learning rate 5e-4": "rate_5e-4",
    "spread of the first logits 1": "spread_1",
    "spread 0.5": "spread_05",
    "density 0.4": "density_40",
    "width 128": "width_128",
    "learned edges": "edges_learned",
    "self term added": "self_residual",
    "no self term": "self_none",
    "projected expert features": "features_projected",
    "Poisson coefficient 0": "poisson_0",
    "Poisson coefficient 0.05": "poisson_05",
    "Poisson coefficient 1": "poisson_1",
    "balance coefficient 0.1": "normal_01",
    "balance 0.3": "normal_03",
    "balance 1": "normal_1",
    "balance 3": "normal_3",
    "loads: moving average": "window_ema",
    "loads: cumulative": "window_cumulative",
    "*LoRA*": "lora",
    "*LoRA, 2e-3*": "lora_rate_2e-3",
    "*LoRA, 5e-4*": "lora_rate_5e-4",
    "*MixLoRA*": "mixlora",
}
ROWS = dict(re.findall(r"^\| `(\w+)` \| ([\d.].*) \|$", PAGE, re.MULTILINE))


def records_of(study):
    found = [json.loads(path.read_text()) for path in sorted((ROOT / "results" / study).glob("*.json"))]
    by_variant = defaultdict(list)
    for record in found:
        by_variant[record["variant"]].append(record)
    return by_variant


@pytest.fixture(scope="module")
def records():
    return records_of("table1_small")


def scores_of(records):
    return {(r["metrics"]["task"], r["seed"]): 100 * r["metrics"]["score"] for r in records}


def worst_cv(records):
    return max(block["load_cv"] for r in records for block in r["metrics"]["routing"].values())


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


def test_the_table_of_edges_is_that_of_the_records(records):
    found = records_of("edges_small")
    rows = re.findall(r"^\| ([^|]+) \| (6\d\.\d\d) \|([^|]*)\|([^|]*)\| ([\d.]+) \|$", PAGE, re.MULTILINE)
    assert len(rows) == len(found) - 1 == 6
    mine = scores_of(found["graphlora"])
    for name, accuracy, difference, _, worst in rows:
        variant = EDGES.get(name, name)
        scores = scores_of(found[variant])
        assert len(scores) == 15
        assert accuracy == f"{fmean(scores.values()):.2f}"
        assert worst == f"{worst_cv(found[variant]):.2f}"
        if variant != "graphlora":
            gap = fmean(scores[key] - mine[key] for key in mine)
            assert float(difference.split(",")[0]) == pytest.approx(gap, abs=0.0051)
    repeated = {(r["metrics"]["task"], r["seed"]): r["metrics"]["train_loss"] for r in found["graphlora"]}
    first = {(r["metrics"]["task"], r["seed"]): r["metrics"]["train_loss"] for r in records["graphlora"]}
    assert repeated == first and mine == scores_of(records["graphlora"])


def test_the_table_of_changes_is_that_of_the_records():
    found = records_of("tuning")
    part = PAGE[PAGE.index("| change | difference | worst CV |") :].split("\n\n")[0]
    rows = re.findall(r"\| ([^|]+) \| ([+-][\d.]+) ± ([\d.]+) \|([^|]*)(?=\|)", part)
    assert {name for name, *_ in rows} == set(CHANGES)
    assert set(CHANGES.values()) == set(found) - {"base", "graphlora"}
    mine = scores_of(found["graphlora"])
    for name, difference, error, worst in rows:
        scores = scores_of(found[CHANGES[name]])
        gaps = [scores[key] - mine[key] for key in mine]
        assert len(gaps) == 4
        assert float(difference) == pytest.approx(fmean(gaps), abs=0.0051)
        assert float(error) == pytest.approx(stdev(gaps) / 2, abs=0.0051)
        if worst.strip():
            assert float(worst.split(",")[0]) == pytest.approx(worst_cv(found[CHANGES[name]]), abs=0.0051)
        assert float(difference) < 2 * float(error)
