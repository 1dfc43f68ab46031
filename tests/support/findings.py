"""docs/findings.md and the records behind it, for the tests that compare them."""

import json
import re
from collections import defaultdict
from functools import cache
from pathlib import Path
from statistics import fmean

from graphlora.report.aggregate import aggregate
from graphlora.report.inference import holm
from graphlora.report.names import AVERAGE
from graphlora.report.reading import read_studies

ROOT = Path(__file__).parents[2]
PAGE = (ROOT / "docs" / "findings.md").read_text(encoding="utf-8")
NUMBER = r"([+-]?[\d,.]*\d)"


def rows_below(heading):
    """Cells of the tables' rows that begin with a method, from a heading to the next one of its level."""
    part = PAGE.split(f"\n## {heading}")[1].split("\n## ")[0]
    rows = re.findall(r"^\| `(\w+)` \|(.*)\|$", part, re.MULTILINE)
    assert len(rows) == len(dict(rows))
    return {variant: [cell.strip() for cell in cells.split("|")] for variant, cells in rows}


def says(text, value):
    """The number is the value, rounded to the digits that it has."""
    digits = len(text.partition(".")[2])
    return abs(float(text) - value) <= 0.5 * 10**-digits + 1e-9


@cache
def records_of(study):
    found = [json.loads(path.read_text()) for path in sorted((ROOT / "results" / study).glob("*.json"))]
    by_variant = defaultdict(list)
    for record in found:
        by_variant[record["variant"]].append(record)
    return by_variant


def scores_of(records):
    return {(r["metrics"]["task"], r["seed"]): 100 * r["metrics"]["score"] for r in records}


def worst_cv(records):
    return max(block["load_cv"] for r in records for block in r["metrics"]["routing"].values())


def routers(records):
    return [block for r in records for block in r["metrics"].get("routing", {}).values()]


def overlaps(records):
    """Mean of the experts' overlap, by task."""
    by_task = defaultdict(list)
    for record in records:
        by_task[record["metrics"]["task"]] += [block["expert_overlap"] for block in routers([record])]
    return {task: fmean(values) for task, values in by_task.items()}


def mean_by_seed(*parts):
    """Mean over tasks of each seed, from the records of one method."""
    by_seed = defaultdict(list)
    for record in (record for part in parts for record in part):
        by_seed[record["seed"]].append(100 * record["metrics"]["score"])
    return {seed: fmean(scores) for seed, scores in by_seed.items()}


def differences(first, second):
    assert first.keys() == second.keys()
    return [first[seed] - second[seed] for seed in first]


@cache
def numbers_of(study):
    """What the report computes of a study."""
    (found,), skipped = read_studies(ROOT / "results" / study)
    assert not skipped
    return aggregate(found)


@cache
def compared(study):
    """The report's comparisons of a study: all, and those over the average of the tasks by method."""
    comparisons = numbers_of(study).comparisons
    return comparisons, {c.variant: c for c in comparisons if c.column == AVERAGE}


@cache
def over_averages(study, variants=None):
    """p values of a study's averages, corrected over these averages alone; of some methods if they are named."""
    found = {v: c for v, c in compared(study)[1].items() if variants is None or v in variants}
    return dict(zip(found, holm([c.t_p for c in found.values()]), strict=True))


def assert_difference(cell, summary):
    """A cell like `-0.83, -1.31 to -0.35`."""
    found = re.fullmatch(r"([+-]?[\d.]+), (-?[\d.]+) to (-?[\d.]+)", cell)
    assert found, cell
    difference, low, high = found.groups()
    assert says(difference, summary.mean) and says(low, summary.low) and says(high, summary.high), cell
    assert difference.startswith("+") == (summary.mean > 0.005)


def assert_said(text, *values, page=PAGE):
    """The page has the text with a number at each `{}`, and the numbers are those values."""
    pattern = NUMBER.join(re.escape(part) for part in text.split("{}"))
    found = re.search(pattern, " ".join(page.split()))
    assert found, text
    assert len(found.groups()) == len(values)
    for number, value in zip(found.groups(), values, strict=True):
        assert says(number.replace(",", ""), value), (found.group(0), value)
