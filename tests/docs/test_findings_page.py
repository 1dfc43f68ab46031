"""docs/findings.md says what the committed records say."""

import json
import re
from collections import defaultdict
from pathlib import Path
from statistics import fmean, stdev

import pytest

from graphlora.report.aggregate import aggregate
from graphlora.report.inference import holm, paired_t_p, summarize
from graphlora.report.names import AVERAGE
from graphlora.report.reading import read_studies

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


def rows_below(heading):
    """Cells of the tables' rows that begin with a method, from a heading to the next one of its level."""
    part = PAGE.split(f"\n## {heading}")[1].split("\n## ")[0]
    rows = re.findall(r"^\| `(\w+)` \|(.*)\|$", part, re.MULTILINE)
    assert len(rows) == len(dict(rows))
    return {variant: [cell.strip() for cell in cells.split("|")] for variant, cells in rows}


ROWS = rows_below("The result")
MORE_ROWS = rows_below("Two more tasks")
FRESH_ROWS = rows_below("The graph on fresh seeds")


def says(text, value):
    """The number is the value, rounded to the digits that it has."""
    digits = len(text.partition(".")[2])
    return abs(float(text) - value) <= 0.5 * 10**-digits + 1e-9


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


def routers(records):
    return [block for r in records for block in r["metrics"].get("routing", {}).values()]


def overlaps(records):
    """Lowest and highest mean of the experts' overlap over the tasks."""
    by_task = defaultdict(list)
    for record in records:
        by_task[record["metrics"]["task"]] += [block["expert_overlap"] for block in routers([record])]
    means = [fmean(values) for values in by_task.values()]
    return f"{min(means):.2f}", f"{max(means):.2f}"


def mean_by_seed(*parts):
    """Mean over tasks of each seed, from the records of one method."""
    by_seed = defaultdict(list)
    for record in (record for part in parts for record in part):
        by_seed[record["seed"]].append(100 * record["metrics"]["score"])
    return {seed: fmean(scores) for seed, scores in by_seed.items()}


def differences(first, second):
    assert first.keys() == second.keys()
    return [first[seed] - second[seed] for seed in first]


def compared(study):
    """The report's comparisons of a study: all, and those over the average of the tasks by method."""
    found, skipped = read_studies(ROOT / "results")
    assert not skipped
    (runs,) = [one for one in found if one.name == study]
    comparisons = aggregate(runs).comparisons
    return comparisons, {c.variant: c for c in comparisons if c.column == AVERAGE}


def assert_difference(cell, summary):
    """A cell like `-0.83, -1.31 to -0.35`."""
    difference, low, high = re.fullmatch(r"([+-]?[\d.]+), (-?[\d.]+) to (-?[\d.]+)", cell).groups()
    assert says(difference, summary.mean) and says(low, summary.low) and says(high, summary.high), cell
    assert difference.startswith("+") == (summary.mean > 0.005)


@pytest.fixture(scope="module")
def table():
    return compared("table1_small")


@pytest.fixture(scope="module")
def more():
    return compared("table1_small_more")


@pytest.fixture(scope="module")
def fresh():
    return compared("graph_small")


def test_every_method_has_five_seeds_of_three_tasks_from_one_clean_commit(records):
    assert set(ROWS) == set(records) - {"base"}
    for variant in ROWS:
        runs = {(record["metrics"]["task"], record["seed"]) for record in records[variant]}
        assert len(runs) == len(records[variant]) == 15, variant
    sources = {(r["provenance"]["commit"], r["provenance"]["dirty"]) for rs in records.values() for r in rs}
    assert [(commit[:7], dirty) for commit, dirty in sources] == [("a3e3797", False)]


@pytest.mark.parametrize("variant", ROWS)
def test_the_table_is_that_of_the_records(records, table, variant):
    trained, accuracy, difference, p, worst, dead = ROWS[variant]
    assert accuracy == f"{fmean(scores_of(records[variant]).values()):.2f}"
    assert trained == f"{records[variant][0]['metrics']['num_trained'] / 1e6:.1f}"
    if variant != "graphlora":
        found = table[1][variant]
        assert_difference(difference, found.difference)
        plain, corrected = p.split("; ")
        assert says(plain, found.t_p) and says(corrected, found.holm_p)
    blocks = routers(records[variant])
    assert bool(worst) == bool(dead) == bool(blocks)
    if blocks:
        assert worst == f"{worst_cv(records[variant]):.2f}"
        share, experts = dead.split(" of ")
        assert says(share, sum(block["dead_experts"] for block in blocks) / 15)
        assert int(experts) == sum(len(block["expert_load"]) for block in blocks) / 15


def test_the_numbers_of_tests_are_those_of_the_reports(table, more, fresh):
    assert [len(found) for found, _ in (table, more, fresh)] == [52, 18, 12]
    for text in ("the\nreport's 52 tests", "the report's 18 tests", "the report itself counts 12 tests"):
        assert " ".join(text.split()) in " ".join(PAGE.split())


def test_wins_and_losses_are_those_of_the_corrected_p(table, more):
    beaten = {v for v, c in table[1].items() if c.holm_p < 0.05}
    assert beaten == {"hydralora", "loramoe_no_constraint"}
    assert {v for v, c in more[1].items() if c.holm_p < 0.05} == {"graphlora_no_normal"}
    single = {(c.column, c.variant) for found in (table, more) for c in found[0] if c.holm_p < 0.05}
    assert single - {(AVERAGE, v) for v in (*beaten, "graphlora_no_normal")} == {
        ("arc_challenge", "lora_matched")
    }
    averages = dict(zip(table[1], holm([c.t_p for c in table[1].values()]), strict=True))
    assert len(averages) == 13 and "Over the 13 averages of today alone it would be 0.021" in " ".join(
        PAGE.split()
    )
    assert says("0.021", averages["lora_matched"]) and says("0.017", averages["loramoe"])


def test_what_is_said_of_the_other_methods_is_in_the_records(records, table):
    text = " ".join(PAGE.split())
    found = {v: (f"{-c.difference.mean:.2f}", f"{c.holm_p:#.2g}") for v, c in table[1].items()}
    assert "by {} points (corrected p {})".format(*found["hydralora"]) in text
    assert "by {} ({})".format(*found["loramoe_no_constraint"]) in text
    assert "{} points (corrected p {})".format(*found["loramoe"]) in text
    assert "({} points below, the interval below zero, corrected p {})".format(*found["mola"]) in text
    assert f"({found['ming_moe'][0]} below, the interval holds zero)" in text
    assert table[1]["mola"].difference.high < 0 < table[1]["ming_moe"].difference.high
    blocks = routers(records["loramoe"])
    assert len(blocks) == 1350 and sum(block["load_cv"] > 0.25 for block in blocks) == 1
    assert overlaps(records["loramoe"]) == ("0.28", "0.41") and "updates is 0.28 to 0.41" in text
    assert overlaps(records["graphlora"]) == ("0.03", "0.04") and "GraphLoRA's 0.03 to 0.04" in text
    assert overlaps(records["hydralora"]) == ("0.93", "0.97") and "shares A: 0.93 to 0.97" in text
    for variant, share in (("ming_moe", 11), ("mola", 16)):
        blocks = routers(records[variant])
        dead = sum(block["dead_experts"] for block in blocks) / sum(len(b["expert_load"]) for b in blocks)
        assert round(100 * dead) == share
    assert "leave 11% and 16% of theirs dead" in text


def test_what_is_said_of_two_more_tasks_is_in_the_records(table, more, fresh):
    found, text = records_of("table1_small_more"), " ".join(PAGE.split())
    of_task = {
        (v, task): fmean(100 * r["metrics"]["score"] for r in found[v] if r["metrics"]["task"] == task)
        for v in ("base", "lora")
        for task in ("arc_challenge", "openbookqa")
    }
    expected = "the base model has {:.1f} and {:.1f}, plain LoRA {:.1f} and {:.1f}".format(*of_task.values())
    assert expected in text
    died = sum(block["dead_experts"] for block in routers(found["graphlora_no_normal"]))
    assert f"and {died} experts died in 10 runs" in text
    above = [one[1]["lora_matched"].difference.mean for one in (table, more, fresh)]
    assert "({:.2f}, {:.2f} and {:.2f} points)".format(*above) in text
    low, high = more[1]["graphlora_no_normal"].difference.low, more[1]["graphlora_no_normal"].difference.high
    assert f"worth 1.35 points** ({-high:.2f} to {-low:.2f})" in text


def test_the_readme_says_what_the_records_say(records):
    text = " ".join((ROOT / "README.md").read_text(encoding="utf-8").split())
    means = {v: fmean(scores_of(found).values()) for v, found in records.items()}
    low, high = min(set(means) - {"base"}, key=means.get), max(means, key=means.get)
    expected = f"from {means['base']:.1f}% to between {means[low]:.1f}% and {means[high]:.1f}%"
    assert expected in text
    assert f"above HydraLoRA ({means['hydralora']:.1f})" in text
    assert f"LoRAMoE without its constraint ({means['loramoe_no_constraint']:.1f})" in text


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
        averages = dict(zip(more[1], holm([c.t_p for c in more[1].values()]), strict=True))
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


def test_one_task_apart_is_told_as_the_records_have_it(more, fresh):
    matched = next(c for c in more[0] if (c.column, c.variant) == ("arc_challenge", "lora_matched"))
    plain = next(c for c in fresh[0] if (c.column, c.variant) == ("arc_easy", "lora"))
    text = " ".join(PAGE.split())
    size = matched.difference
    assert (
        f"{size.mean:.2f} points ({size.low:.2f} to {size.high:.2f}, corrected p {matched.holm_p:.3f})"
        in text
    )
    size = plain.difference
    assert (
        f"{-size.mean:.2f} points below ({-size.high:.2f} to {-size.low:.2f}, corrected p {plain.holm_p:.3f}"
        in text
    )


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
        assert of_two[planned.index(variant)] > 0.05, "not confirmed"


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
