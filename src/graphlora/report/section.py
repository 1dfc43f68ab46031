"""What a report says about one study, before it becomes HTML, Markdown or LaTeX."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable
from dataclasses import dataclass

from graphlora.report.aggregate import StudyNumbers
from graphlora.report.figures_study import study_pictures
from graphlora.report.names import METRICS, file_name, listed, natural, task_label, variant_label
from graphlora.report.plotting import Picture
from graphlora.report.reading import BASE
from graphlora.report.tables import Table, study_tables

GAPS = "Gaps among these records"
# Records alone do not tell what was planned.
NO_GAPS = (
    "None: every method has each task and seed that another one has. Records do not say what else was planned; "
    "`graphlora study status` does."
)


@dataclass(frozen=True)
class Section:
    """One study.

    Attributes:
        name: Name of the study.
        summary: One paragraph: size, metric, what is compared.
        notes: What was left out or looks odd.
        tables: Tables, the scores first.
        pictures: Pictures.
        missing: Runs that failed, or that one method has and another lacks, one sentence each.
        provenance: (what, value) pairs: commits, versions, devices, data.
    """

    name: str
    summary: str
    notes: tuple[str, ...]
    tables: tuple[Table, ...]
    pictures: tuple[Picture, ...]
    missing: tuple[str, ...]
    provenance: tuple[tuple[str, str], ...]

    def picture_file(self, picture: Picture, file_format: str) -> str:
        """Name of a picture's file."""
        return f"{file_name(f'{self.name}-{picture.name}')}.{file_format}"


def study_section(numbers: StudyNumbers) -> Section:
    """Everything that the report says about a study."""
    study = numbers.study
    failures = [
        f"failed: {record.variant}, {record.metrics.get('task', 'task unknown')}, seed {record.seed}: "
        f"{record.metrics.get('error', 'no reason recorded')}"
        for record in study.failures
    ]
    return Section(
        name=study.name,
        summary=_summary(numbers),
        notes=study.notes,
        tables=tuple(study_tables(numbers)),
        pictures=tuple(study_pictures(numbers)),
        missing=(*failures, *numbers.missing),
        provenance=tuple(_provenance(numbers)),
    )


def _summary(numbers: StudyNumbers) -> str:
    runs = [run for run in numbers.study.runs if run.variant != BASE]
    variants = {run.variant for run in runs}
    seeds = sorted({run.seed for run in runs})
    tasks = sorted({task for scores in numbers.models for task in scores.tasks}, key=natural)
    models = listed(scores.model for scores in numbers.models)
    text = (
        f"{len(runs)} runs of {len(variants)} methods on {listed(map(task_label, tasks))} with {models}, "
        f"{'seed' if len(seeds) == 1 else 'seeds'} {listed(seeds)}. "
        f"Scores are {METRICS.get(numbers.metric, numbers.metric)} on the {numbers.study.split} split."
    )
    if numbers.reference is None:
        return text + " There is no GraphLoRA variant to compare with; name another reference."
    return text + f" Compared with {variant_label(numbers.reference)}."


def _provenance(numbers: StudyNumbers) -> Iterable[tuple[str, str]]:
    runs = numbers.study.runs
    records = [run.record for run in runs]
    yield (
        "commit",
        _counted(
            (run.commit or "unknown") + (" with uncommitted changes" if run.dirty else "") for run in runs
        ),
    )
    yield "made", f"{min(r.created for r in records)} to {max(r.created for r in records)}"
    yield "device", _counted(str(record.device) for record in records)
    yield "dtype", _counted(str(record.dtype) for record in records)
    yield (
        "versions",
        _counted(
            ", ".join(f"{name} {version}" for name, version in (r.provenance.get("versions") or {}).items())
            or "unknown"
            for r in records
        ),
    )
    yield (
        "Python, platform",
        _counted(
            f"{r.provenance.get('python', 'unknown')}, {r.provenance.get('platform', 'unknown')}"
            for r in records
        ),
    )
    hashes: dict[str, set[str]] = {}
    for run in runs:
        if run.record.data_hash and run.variant != BASE:
            hashes.setdefault(run.task, set()).add(run.record.data_hash)
    if hashes:
        yield (
            "data",
            "; ".join(f"{task}: {', '.join(sorted(values))}" for task, values in sorted(hashes.items())),
        )
    seconds = sum(record.wall_time or 0.0 for record in records)
    if seconds:
        yield (
            "time of all runs",
            f"{seconds / 3600:.2f} hours" if seconds > 3600 else f"{seconds:.0f} seconds",
        )


def _counted(values: Iterable[str]) -> str:
    """Values with the number of records that have them, the most frequent first."""
    counts = Counter(values).most_common()
    return "; ".join(value if len(counts) == 1 else f"{value} ({count} records)" for value, count in counts)
