"""From the records of a study to its numbers: scores, paired comparisons, ratios of variances, costs."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from graphlora.errors import GraphLoraError
from graphlora.report.inference import (
    Summary,
    VarianceRatio,
    holm,
    mean,
    paired_t_p,
    pooled_variance,
    sign_flip_p,
    summarize,
    variance_ratio,
)
from graphlora.report.names import AVERAGE, is_share, natural, ordered_variants
from graphlora.report.reading import BASE, Run, StudyRuns


@dataclass(frozen=True)
class Cell:
    """One variant on one task.

    Attributes:
        values: Score by seed, in percent (a loss: in nats).
        summary: Mean, standard deviation and interval over seeds, in the same unit.
        marked: Whether a record of another commit or a dirty tree is among them.
    """

    values: Mapping[int, float]
    summary: Summary
    marked: bool


@dataclass(frozen=True)
class Comparison:
    """A variant against the reference on one task, over the seeds that both have.

    Attributes:
        model: Base model.
        column: Task, or `AVERAGE`.
        variant: The variant.
        difference: Variant minus reference, in points of percent.
        t_p: p value of the paired t test; `None` for one seed.
        flip_p: p value of the exact sign-flip test.
        holm_p: `t_p` after Holm's correction over every comparison of the study.
    """

    model: str
    column: str
    variant: str
    difference: Summary
    t_p: float | None
    flip_p: float | None
    holm_p: float | None = None


@dataclass(frozen=True)
class ModelScores:
    """All scores of one base model in one study.

    Attributes:
        model: Base model.
        tasks: Columns but for the average, in their order.
        variants: Rows in the order of the tables; `base` first where there is one.
        cells: By variant and column; the average over tasks is column `AVERAGE`.
        runs: The runs behind them, by variant and column.
    """

    model: str
    tasks: tuple[str, ...]
    variants: tuple[str, ...]
    cells: Mapping[tuple[str, str], Cell]
    runs: Mapping[tuple[str, str], tuple[Run, ...]]

    @property
    def columns(self) -> tuple[str, ...]:
        """Tasks, and their average where there are several."""
        return (*self.tasks, AVERAGE) if len(self.tasks) > 1 else self.tasks

    @property
    def overall(self) -> str:
        """The column that sums a variant up."""
        return self.columns[-1]

    @property
    def trained(self) -> tuple[str, ...]:
        """Variants but for the untouched base model."""
        return tuple(variant for variant in self.variants if variant != BASE)


@dataclass(frozen=True)
class StudyNumbers:
    """The numbers of one study.

    Attributes:
        study: Its records.
        reference: Variant that the others are compared with; `None` where there is none.
        models: Scores by base model.
        comparisons: Every variant and column against the reference.
        missing: What other variants or tasks have and these have not, one sentence each.
    """

    study: StudyRuns
    reference: str | None
    models: tuple[ModelScores, ...]
    comparisons: tuple[Comparison, ...]
    missing: tuple[str, ...]

    @property
    def metric(self) -> str:
        """Headline metric."""
        return self.study.runs[-1].metric


def aggregate(study: StudyRuns, reference: str | None = None) -> StudyNumbers:
    """Scores and comparisons of a study.

    Args:
        study: Its records.
        reference: Variant to compare with; by default the GraphLoRA variant.

    Raises:
        GraphLoraError: Unknown reference.
    """
    variants = {run.variant for run in study.runs}
    reference = _reference(study, reference, sorted(variants, key=natural))
    names = sorted({run.model for run in study.runs}, key=natural)
    models = tuple(
        _model_scores(name, [run for run in study.runs if run.model == name], study.split, reference)
        for name in names
    )
    found = [comparison for scores in models for comparison in _comparisons(scores, reference)]
    corrected = holm([comparison.t_p for comparison in found])
    comparisons = tuple(
        Comparison(**{**vars(comparison), "holm_p": p})
        for comparison, p in zip(found, corrected, strict=True)
    )
    missing = tuple(sentence for scores in models for sentence in _missing(scores, len(models) > 1))
    return StudyNumbers(study, reference, models, comparisons, missing)


def stability(
    scores: ModelScores, variant: str, other: str, column: str | None = None
) -> VarianceRatio | None:
    """Variance over seeds of one variant over another one's, with its interval.

    Args:
        scores: Scores of one model.
        variant: Variant in the numerator.
        other: Variant in the denominator.
        column: Task; by default the variances are pooled over the tasks that both have.
    """
    columns = scores.tasks if column is None else (column,)
    shared = [c for c in columns if (variant, c) in scores.cells and (other, c) in scores.cells]
    first, second = (
        pooled_variance([list(scores.cells[name, c].values.values()) for c in shared])
        for name in (variant, other)
    )
    return variance_ratio(*first, *second)


def metric_mean(runs: Sequence[Run], name: str) -> float | None:
    """Mean over runs of a number of their metrics or, for `peak_memory` and `wall_time`, of the record."""
    values = [
        float(value)
        for run in runs
        if (value := run.record.metrics.get(name, getattr(run.record, name, None))) is not None
    ]
    return mean(values) if values else None


def variant_runs(scores: ModelScores, variant: str) -> list[Run]:
    """The runs of a variant, each once."""
    found = {id(run): run for (name, _), runs in scores.runs.items() if name == variant for run in runs}
    return list(found.values())


def _reference(study: StudyRuns, wanted: str | None, variants: list[str]) -> str | None:
    if wanted is not None:
        if wanted not in variants:
            raise GraphLoraError(
                f"{study.name} has no variant {wanted!r} to compare with; it has: {', '.join(variants)}"
            )
        return wanted
    by_method = {run.variant for run in study.runs if run.record.metrics.get("method") == "graphlora"}
    for name in ("graphlora", "default", "reference"):
        if name in variants:
            return name
    named = [variant for variant in variants if variant.startswith("graphlora")]
    return min(named or sorted(by_method), key=lambda name: (len(name), natural(name)), default=None)


def _model_scores(model: str, runs: Sequence[Run], split: str, reference: str | None) -> ModelScores:
    scored: dict[tuple[str, str], dict[int, float]] = defaultdict(dict)
    behind: dict[tuple[str, str], list[Run]] = defaultdict(list)
    trained_on: dict[str, set[str]] = defaultdict(set)
    for run in runs:
        for task in run.scores(split):
            if run.variant != BASE:
                trained_on[task].add(run.task)
    for run in runs:
        for task, value in run.scores(split).items():
            sources = trained_on[task] if run.variant == BASE else {run.task}
            for column in {_column(task, source, trained_on[task]) for source in sources or {task}}:
                scored[run.variant, column][run.seed] = value * (100 if is_share(run.metric) else 1)
                behind[run.variant, column].append(run)
    tasks = tuple(sorted({column for _, column in scored}, key=natural))
    variants = tuple(ordered_variants({variant for variant, _ in scored}, reference))
    cells = {key: _cell(values, behind[key]) for key, values in scored.items()}
    if len(tasks) > 1:
        for variant in variants:
            if average := _average(variant, tasks, cells):
                cells[variant, AVERAGE] = average
    return ModelScores(model, tasks, variants, cells, {key: tuple(value) for key, value in behind.items()})


def _column(task: str, source: str, trained_on: set[str]) -> str:
    """Column of a score on a task: with what was trained on where there are several such sources."""
    return task if source == task or len(trained_on) < 2 else f"{task} (trained on {source})"


def _cell(values: Mapping[int, float], runs: Sequence[Run]) -> Cell:
    ordered = dict(sorted(values.items()))
    return Cell(ordered, summarize(list(ordered.values())), any(run.marked for run in runs))


def _average(variant: str, tasks: Sequence[str], cells: Mapping[tuple[str, str], Cell]) -> Cell | None:
    """Mean over tasks seed by seed, over the seeds that have every task."""
    parts = [cells.get((variant, task)) for task in tasks]
    found = [part for part in parts if part is not None]
    shared = set(found[0].values).intersection(*(part.values for part in found)) if found else set()
    if len(found) < len(tasks) or not shared:
        return None
    values = {seed: mean([part.values[seed] for part in found]) for seed in sorted(shared)}
    return Cell(values, summarize(list(values.values())), any(part.marked for part in found))


def _comparisons(scores: ModelScores, reference: str | None) -> list[Comparison]:
    found = []
    for column in scores.columns:
        ours = scores.cells.get((reference, column)) if reference else None
        for variant in scores.trained:
            theirs = scores.cells.get((variant, column))
            if variant == reference or ours is None or theirs is None:
                continue
            shared = [seed for seed in theirs.values if seed in ours.values]
            if not shared:
                continue
            differences = [theirs.values[seed] - ours.values[seed] for seed in shared]
            found.append(
                Comparison(
                    scores.model,
                    column,
                    variant,
                    summarize(differences),
                    paired_t_p(differences),
                    sign_flip_p(differences),
                )
            )
    return found


def _missing(scores: ModelScores, name_model: bool) -> list[str]:
    """Runs and seeds that a complete grid of this model's variants, tasks and seeds would have."""
    sentences = []
    where = f" with {scores.model}" if name_model else ""
    for task in scores.tasks:
        cells: dict[str, Any] = {variant: scores.cells.get((variant, task)) for variant in scores.trained}
        seeds = sorted({seed for cell in cells.values() if cell for seed in cell.values})
        for variant, cell in cells.items():
            absent = [seed for seed in seeds if cell is None or seed not in cell.values]
            if cell is None:
                sentences.append(f"{variant} on {task}{where}: no run.")
            elif absent:
                several = "seeds" if len(absent) > 1 else "seed"
                sentences.append(f"{variant} on {task}{where}: {several} {', '.join(map(str, absent))}.")
    return sentences
