"""docs/findings.md says what the committed records say."""

import re
from statistics import fmean, stdev

import pytest
from findings import (
    PAGE,
    assert_difference,
    compared,
    differences,
    mean_by_seed,
    over_averages,
    records_of,
    routers,
    rows_below,
    says,
    scores_of,
    worst_cv,
)

from graphlora.report.inference import holm, paired_t_p, summarize
from graphlora.report.names import AVERAGE

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


ROWS = rows_below("The result")
MORE_ROWS = rows_below("Two more tasks")
FRESH_ROWS = rows_below("The graph on fresh seeds")


@pytest.fixture(scope="module")
def records():
    return records_of("table1_small")


@pytest.fixture(scope="module")
def table():
    return compared("table1_small")


@pytest.fixture(scope="module")
def more():
    return compared("table1_small_more")


def test_every_method_has_five_seeds_of_three_tasks_from_one_clean_commit(records):
    assert set(ROWS) == set(records) - {"base"}
    for variant in ROWS:
        runs = {(record["metrics"]["task"], record["seed"]) for record in records[variant]}
        assert len(runs) == len(records[variant]) == 15, variant
    sources = {(r["provenance"]["commit"], r["provenance"]["dirty"]) for rs in records.values() for r in rs}
    assert [(commit[:7], dirty) for commit, dirty in sources] == [("a3e3797", False)]


@pytest.mark.parametrize("variant", ROWS)
def test_the_table_is_that_of_the_records(records, table, variant):
    trained, accuracy, difference, p, corrected, of_averages, worst, dead = ROWS[variant]
    assert accuracy == f"{fmean(scores_of(records[variant]).values()):.2f}"
    assert trained == f"{records[variant][0]['metrics']['num_trained'] / 1e6:.1f}"
    if variant != "graphlora":
        found = table[1][variant]
        assert_difference(difference, found.difference)
        assert len(table[0]) == 52 and len(table[1]) == 13
        assert says(p, found.t_p) and says(corrected, found.holm_p)
        assert says(of_averages, over_averages("table1_small")[variant])
    blocks = routers(records[variant])
    assert bool(worst) == bool(dead) == bool(blocks)
    if blocks:
        assert worst == f"{worst_cv(records[variant]):.2f}"
        share, experts = dead.split(" of ")
        assert says(share, sum(block["dead_experts"] for block in blocks) / 15)
        assert int(experts) == sum(len(block["expert_load"]) for block in blocks) / 15


def test_wins_and_losses_are_those_of_the_corrected_p(table, more):
    beaten = {v for v, c in table[1].items() if c.holm_p < 0.05}
    assert beaten == {"hydralora", "loramoe_no_constraint"}
    assert {v for v, c in more[1].items() if c.holm_p < 0.05} == {"graphlora_no_normal"}
    assert {v for v, p in over_averages("table1_small").items() if p < 0.05} == {
        *beaten,
        "loramoe",
        "lora_matched",
    }
    assert {v for v, p in over_averages("table1_small_more").items() if p < 0.05} == {
        "graphlora_no_normal",
        "mixlora",
    }
    for study in ("graph_small", "edges_small"):
        assert all(c.holm_p > 0.05 for c in compared(study)[0])
        assert all(p > 0.05 for p in over_averages(study).values())
    single = {(c.column, c.variant) for found in (table, more) for c in found[0] if c.holm_p < 0.05}
    assert single - {(AVERAGE, v) for v in (*beaten, "graphlora_no_normal")} == {
        ("arc_challenge", "lora_matched")
    }


@pytest.mark.parametrize("variant", MORE_ROWS)
def test_the_table_of_two_more_tasks_is_that_of_the_records(more, variant):
    found = records_of("table1_small_more")
    assert set(MORE_ROWS) == set(found) - {"base"}
    assert {(r["metrics"]["task"], r["seed"]) for r in found[variant]} == {
        (task, seed) for task in ("arc_challenge", "openbookqa") for seed in range(5)
    }
    accuracy, difference, p, corrected, of_averages, worst, dead = MORE_ROWS[variant]
    assert accuracy == f"{fmean(scores_of(found[variant]).values()):.2f}"
    if variant != "graphlora":
        averages = over_averages("table1_small_more")
        assert len(averages) == 6
        assert_difference(difference, more[1][variant].difference)
        assert says(p, more[1][variant].t_p) and says(corrected, more[1][variant].holm_p)
        assert says(of_averages, averages[variant])
    blocks = routers(found[variant])
    assert bool(worst) == bool(dead) == bool(blocks)
    if blocks:
        assert worst == f"{worst_cv(found[variant]):.2f}"
        assert says(dead, sum(block["dead_experts"] for block in blocks) / 10)
        assert sum(len(block["expert_load"]) for block in blocks) == 10 * 240


@pytest.mark.parametrize("variant", FRESH_ROWS)
def test_the_table_of_fresh_seeds_is_that_of_the_records(records, variant):
    found = records_of("graph_small")
    assert set(FRESH_ROWS) == set(found) - {"base"}
    accuracy, difference, p, of_ten, ten_difference, ten_p = FRESH_ROWS[variant]
    fresh, every = mean_by_seed(found[variant]), mean_by_seed(found[variant], records[variant])
    assert set(fresh) == set(range(5, 10)) and set(every) == set(range(10))
    assert accuracy == f"{fmean(fresh.values()):.2f}" and of_ten == f"{fmean(every.values()):.2f}"
    if variant == "graphlora":
        return
    gaps = differences(fresh, mean_by_seed(found["graphlora"]))
    ten_gaps = differences(every, mean_by_seed(found["graphlora"], records["graphlora"]))
    assert_difference(difference, summarize(gaps))
    assert_difference(ten_difference, summarize(ten_gaps))
    assert says(ten_p, paired_t_p(ten_gaps))
    planned = ("graphlora_no_graph", "lora_matched")
    reference = mean_by_seed(found["graphlora"])
    of_two = holm([paired_t_p(differences(mean_by_seed(found[name]), reference)) for name in planned])
    plain, _, corrected = p.partition("; ")
    assert says(plain.strip(";"), paired_t_p(gaps))
    assert bool(corrected) == (variant in planned)
    if corrected:
        assert says(corrected, of_two[planned.index(variant)])
        assert float(corrected) > 0.05, "not confirmed"


@pytest.mark.parametrize(
    ("study", "count", "worst"),
    [("table1_small", 213, 0.203), ("table1_small_more", 72, 0.204), ("graph_small", 63, 0.223)],
)
def test_the_studies_have_the_records_and_the_balance_that_the_page_says(study, count, worst):
    found = records_of(study)
    assert sum(map(len, found.values())) == count
    assert f"\n{count} records in `results/{study}`" in PAGE
    assert {
        (r["provenance"]["commit"][:7], r["provenance"]["dirty"]) for rs in found.values() for r in rs
    } == {("a3e3797", False)}
    assert round(worst_cv(found["graphlora"]), 3) == worst
    assert not any(block["dead_experts"] for block in routers(found["graphlora"]))


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
    for name, accuracy, difference, p, worst in rows:
        variant = EDGES.get(name, name)
        scores = scores_of(found[variant])
        assert len(scores) == 15
        assert accuracy == f"{fmean(scores.values()):.2f}"
        assert worst == f"{worst_cv(found[variant]):.2f}"
        if variant != "graphlora":
            assert_difference(difference.strip(), compared("edges_small")[1][variant].difference)
            assert says(p.strip(), compared("edges_small")[1][variant].t_p)
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
