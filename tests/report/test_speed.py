"""Accuracy against speed is drawn where runs had their device alone, and left out with a reason where they had not."""

from dataclasses import replace

import pytest
from study_records import table_records, write_records

from graphlora.records import WORKERS
from graphlora.report.aggregate import aggregate
from graphlora.report.reading import read_studies
from graphlora.report.section import study_section
from graphlora.report.speed import speed_problem

TIMED = {"step (ms)", "tokens/s", "training (s)"}


def records(workers=None, spread=0.0):
    """Records whose speed differs between seeds by `spread` of its mean, up and down."""
    found = []
    for record in table_records(seeds=range(3)):
        speed = record.metrics.get("tokens_per_second")
        metrics = dict(record.metrics)
        if speed is not None:
            metrics["tokens_per_second"] = speed * (1 + spread * (record.seed - 1))
        provenance = dict(record.provenance) | ({} if workers is None else {WORKERS: workers})
        found.append(replace(record, metrics=metrics, provenance=provenance))
    return found


def section_of(found, folder):
    write_records(found, folder)
    (study,), _ = read_studies(folder)
    numbers = aggregate(study)
    return study_section(numbers), speed_problem(numbers.models[0])


def drawn(section):
    (picture,) = [picture for picture in section.pictures if picture.name == "efficiency"]
    (table,) = [table for table in section.tables if table.name == "cost"]
    return [axes.get_xlabel() for axes in picture.draw().axes], picture.caption, table


@pytest.mark.parametrize(("workers", "spread"), [(1, 0.0), (1, 0.15), (None, 0.15)])
def test_steady_runs_that_had_the_device_alone_are_drawn_against_speed(tmp_path, workers, spread):
    section, problem = section_of(records(workers, spread), tmp_path)
    labels, caption, table = drawn(section)
    assert problem is None
    assert labels == ["trained parameters, millions", "tokens per second in training"]
    assert "Against speed, the upper right is better" in caption
    assert set(table.columns) > TIMED
    assert {len(row) for row in table.rows} == {len(table.columns)}


@pytest.mark.parametrize(
    ("workers", "spread", "reason"),
    [
        (8, 0.0, "Up to 8 runs shared a device, so"),
        (
            8,
            0.3,
            "Up to 8 runs shared a device and the speed of one method on one task varied over seeds by up to 30%",
        ),
        (
            None,
            0.3,
            "The records do not say how many runs shared a device and the speed of one method on one task",
        ),
        (1, 0.3, "The speed of one method on one task varied over seeds by up to 30%"),
    ],
)
def test_speeds_that_do_not_compare_are_left_out_and_the_reader_is_told_why(
    tmp_path, workers, spread, reason
):
    section, problem = section_of(records(workers, spread), tmp_path)
    labels, caption, table = drawn(section)
    assert problem is not None
    assert problem.startswith(reason)
    assert labels == ["trained parameters, millions"]
    assert problem[1:] in caption
    assert problem in table.caption
    assert "docs/performance.md" in problem
    assert "Against speed" not in caption
    assert not TIMED & set(table.columns)
    assert table.columns[-1] == "peak memory (GiB)"
    assert {len(row) for row in table.rows} == {len(table.columns)}


def test_speeds_of_several_devices_do_not_compare(tmp_path):
    found = [replace(r, device="another") if r.variant == "lora" else r for r in records(1)]
    _, problem = section_of(found, tmp_path)
    assert problem is not None
    assert problem.startswith("Runs used different devices, so")


def test_runs_without_a_speed_have_nothing_to_compare(tmp_path):
    found = [
        replace(r, metrics={name: v for name, v in r.metrics.items() if name != "tokens_per_second"})
        for r in records(8)
    ]
    section, problem = section_of(found, tmp_path)
    labels, caption, _ = drawn(section)
    assert problem is None
    assert labels == ["trained parameters, millions"]
    assert "speed" not in caption
