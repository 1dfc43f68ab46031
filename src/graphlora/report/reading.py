"""Records of studies from a folder: which count, which are left out and why."""

from __future__ import annotations

import re
from collections import Counter, defaultdict
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path, PurePosixPath
from typing import Any

from graphlora.errors import GraphLoraError
from graphlora.records import RunRecord
from graphlora.report.names import study_order

NAME = re.compile(r"[A-Za-z0-9][A-Za-z0-9_-]*")
KIND, FAILURE = "study", "study-failure"
BASE = "base"


@dataclass(frozen=True)
class Run:
    """One record of a study that counts.

    Attributes:
        path: Its file.
        record: The record.
        marked: Whether it comes from another commit than most, or from a tree with uncommitted changes.
    """

    path: Path
    record: RunRecord
    marked: bool = False

    @property
    def variant(self) -> str:
        """Variant within the study; `base` is the untouched model."""
        return str(self.record.variant)

    @property
    def model(self) -> str:
        """Last part of the base model's name: a copy in another folder is the same model."""
        return PurePosixPath(str(self.record.model or "model").replace("\\", "/").rstrip("/")).name

    @property
    def task(self) -> str:
        """What was trained on."""
        return str(self.record.metrics["task"])

    @property
    def seed(self) -> int:
        """Seed of the run; 0 where the record has none, as a base model may."""
        return self.record.seed or 0

    @property
    def commit(self) -> str | None:
        """Source commit."""
        return self.record.provenance.get("commit")

    @property
    def dirty(self) -> bool:
        """Whether the tree had uncommitted changes."""
        return bool(self.record.provenance.get("dirty"))

    @property
    def metric(self) -> str:
        """Name of the headline metric."""
        return str(self.record.metrics.get("metric", "acc_norm"))

    def scores(self, split: str) -> dict[str, float]:
        """Headline metric by task of a split (`"test"` or `"validation"`), as shares; without those not finite."""
        found = self.record.metrics.get(split) or {}
        if not found and self.variant == BASE and split == "test":
            found = self.record.metrics.get("baseline") or {}
        return {
            task: float(value)
            for task, values in found.items()
            if isinstance(values, dict) and (value := values.get(self.metric)) is not None
        }


@dataclass(frozen=True)
class StudyRuns:
    """The records of one study.

    Attributes:
        name: Name of the study.
        runs: Records that count, in the order of their creation.
        commit: Commit that most of them come from; `None` where they name none.
        notes: What was left out or looks odd, one sentence each.
        failures: Records of runs that failed and were not repeated with success.
        split: `"test"`, or `"validation"` for a study that never touched the test split.
    """

    name: str
    runs: tuple[Run, ...]
    commit: str | None
    notes: tuple[str, ...]
    failures: tuple[RunRecord, ...]
    split: str


def read_studies(
    folder: str | Path,
    study: str | None = None,
    include_dirty: bool = False,
    all_commits: bool = False,
) -> tuple[list[StudyRuns], list[str]]:
    """The studies whose records lie in a folder or in folders of it.

    Args:
        folder: The folder, or one record.
        study: Name of the one study to read; all when left out.
        include_dirty: Keep records from a tree with uncommitted changes, marked.
        all_commits: Keep records of other commits than the one of most records, marked.

    Returns:
        The studies by name, and one sentence per file that could not be read.

    Raises:
        GraphLoraError: No such folder, no records of a study, or an unknown study.
    """
    found, broken = _records(Path(folder))
    studies: dict[str, list[Run]] = defaultdict(list)
    for run in found:
        studies[str(run.record.study)].append(run)
    if not studies:
        hint = f" ({broken[0]})" if broken else "; make some with: graphlora study run"
        raise GraphLoraError(f"there are no records of a study in {folder}{hint}")
    if study is not None and study not in studies:
        raise GraphLoraError(
            f"there is no study {study!r} in {folder}; there are: {', '.join(sorted(studies))}"
        )
    if study is not None:
        return [_study(study, studies[study], include_dirty, all_commits)], broken
    usable, empty = [], []
    for name in sorted(studies, key=study_order):
        try:
            usable.append(_study(name, studies[name], include_dirty, all_commits))
        except GraphLoraError as error:
            empty.append(f"left out: {error}")
    if not usable:
        raise GraphLoraError(empty[0].removeprefix("left out: "))
    return usable, broken + empty


def _records(folder: Path) -> tuple[list[Run], list[str]]:
    if not folder.exists():
        raise GraphLoraError(f"there is no folder {folder}; give the one that a study wrote its records to")
    paths = [folder] if folder.is_file() else sorted(folder.rglob("*.json"))
    found, broken = [], []
    for path in paths:
        if any(part.startswith(".") for part in path.relative_to(folder).parts):
            continue
        try:
            record = RunRecord.read(path)
            problem = _problem(record)
        except GraphLoraError as error:
            # Other JSON files may lie beside the records.
            if "no schema_version" not in str(error) or path == folder:
                broken.append(f"skipped: {error}")
            continue
        if record.kind not in (KIND, FAILURE):
            continue
        if problem:
            broken.append(f"skipped: {path}: {problem}")
            continue
        found.append(Run(path, record))
    return sorted(found, key=lambda run: (run.record.created, str(run.path))), broken


def _problem(record: RunRecord) -> str | None:
    """What a record of a study lacks to be counted."""
    if not record.study or not record.variant:
        return "a study's record without study or variant"
    if not NAME.fullmatch(record.study):
        return f"its study {record.study!r} is no name, which its files would have"
    if record.kind == KIND and "task" not in record.metrics:
        return "a study's record without metrics.task"
    return None


def _study(name: str, found: Sequence[Run], include_dirty: bool, all_commits: bool) -> StudyRuns:
    runs = [run for run in found if run.record.kind == KIND]
    notes: list[str] = []
    clean = [run for run in runs if not run.dirty]
    if not include_dirty:
        if runs and not clean:
            raise GraphLoraError(
                f"all {len(runs)} records of {name} come from a tree with uncommitted changes; commit and run again, "
                "or give --include-dirty"
            )
        if dropped := len(runs) - len(clean):
            notes.append(
                f"{_records_text(dropped)} from a tree with uncommitted changes left out (--include-dirty keeps them)."
            )
        runs = clean
    commit = _usual_commit(clean or runs)
    others = [run for run in runs if run.commit != commit]
    if others and not all_commits:
        commits = ", ".join(sorted({(run.commit or "unknown")[:10] for run in others}))
        notes.append(
            f"{_records_text(len(others))} of other commits than {(commit or 'unknown')[:10]} left out: {commits} "
            "(--all-commits keeps them)."
        )
        runs = [run for run in runs if run.commit == commit]
    runs, repeated = _newest(
        [replace(run, marked=run.dirty or run.commit != commit) for run in runs if _has_scores(run)]
    )
    if repeated:
        notes.append(
            f"{_records_text(repeated)} left out where a newer one has the same model, task, variant and seed."
        )
    if marked := sum(run.marked for run in runs):
        notes.append(f"{_records_text(marked)} marked †: of another commit or with uncommitted changes.")
    if not runs:
        raise GraphLoraError(f"no record of {name} has a score yet; see: graphlora study status")
    split = "test" if any(run.scores("test") for run in runs if run.variant != BASE) else "validation"
    if all(run.variant == BASE for run in runs):
        split = "test" if runs[0].scores("test") else "validation"
    notes += _oddities(runs)
    return StudyRuns(name, tuple(runs), commit, tuple(notes), _failures(found, runs), split)


def _records_text(count: int) -> str:
    return f"{count} record{'' if count == 1 else 's'}"


def _has_scores(run: Run) -> bool:
    return bool(run.scores("test") or run.scores("validation"))


def _usual_commit(runs: Sequence[Run]) -> str | None:
    """Commit of most records; of several, the one with the newest record."""
    counts = Counter(run.commit for run in runs)
    newest = {run.commit: index for index, run in enumerate(runs)}
    return max(counts, key=lambda commit: (counts[commit], newest[commit])) if counts else None


def _key(run: Run) -> tuple[str, str, str, int]:
    return run.model, run.task, run.variant, run.seed


def _newest(runs: Sequence[Run]) -> tuple[list[Run], int]:
    newest = {_key(run): run for run in runs}
    kept = [run for run in runs if newest[_key(run)] is run]
    return kept, len(runs) - len(kept)


def _failures(found: Sequence[Run], kept: Sequence[Run]) -> tuple[RunRecord, ...]:
    done = {_key(run) for run in kept}
    failed = [run for run in found if run.record.kind == FAILURE]
    return tuple(run.record for run in failed if "task" not in run.record.metrics or _key(run) not in done)


def _oddities(runs: Sequence[Run]) -> list[str]:
    """Differences within a study that a comparison should not have."""
    notes = []
    trained = [run for run in runs if run.variant != BASE]
    for what, values in (
        ("devices", {run.record.device for run in trained}),
        ("dtypes", {run.record.dtype for run in trained}),
        ("metrics", {run.metric for run in trained}),
    ):
        if len(values) > 1:
            notes.append(f"The runs used several {what}: {', '.join(sorted(map(str, values)))}.")
    data: dict[Any, set[str]] = defaultdict(set)
    for run in trained:
        if run.record.data_hash:
            data[run.model, run.task, run.seed].add(run.record.data_hash)
    if uneven := sorted({task for (_, task, _), hashes in data.items() if len(hashes) > 1}):
        notes.append(f"Variants were trained on different data (data_hash) for: {', '.join(uneven)}.")
    return notes
