"""Pictures of a study's scores: seeds and means, differences to the reference, accuracy against cost."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from graphlora.report.aggregate import (
    Comparison,
    ModelScores,
    StudyNumbers,
    metric_mean,
    variant_runs,
)
from graphlora.report.figures_curves import curve_picture
from graphlora.report.figures_routing import routing_pictures
from graphlora.report.figures_sweep import sweep_picture
from graphlora.report.names import AVERAGE, METRICS, variant_label
from graphlora.report.plotting import (
    BLUE,
    FONT,
    GRAY,
    INK,
    VERMILION,
    WIDTH,
    Picture,
    legend,
    panels,
    styles,
)
from graphlora.report.reading import BASE
from graphlora.report.tables import column_label, seeds_text

BARS = "Bars: 95% t interval over seeds"
ONE_SEED = "One seed each, so there are no error bars"


def study_pictures(numbers: StudyNumbers) -> list[Picture]:
    """Every picture that the study has the numbers for, model by model."""
    pictures = []
    for scores in numbers.models:
        suffix = f"-{scores.model}" if len(numbers.models) > 1 else ""
        found = [
            _score_picture(numbers, scores, suffix),
            _difference_picture(numbers, scores, suffix),
            sweep_picture(numbers, scores, suffix),
            _efficiency_picture(numbers, scores, suffix),
            curve_picture(numbers, scores, suffix),
            *routing_pictures(numbers, scores, suffix),
        ]
        pictures += [picture for picture in found if picture is not None]
    return pictures


def _score_picture(numbers: StudyNumbers, scores: ModelScores, suffix: str) -> Picture | None:
    metric = METRICS.get(numbers.metric, numbers.metric)
    several = any(cell.summary.n > 1 for cell in scores.cells.values())
    base = " The dotted line is the untouched base model." if BASE in scores.variants else ""
    caption = (
        f"Scores of {scores.model}, {seeds_text(scores)}. Small dots: one seed each; large mark: their mean. "
        f"{BARS if several else ONE_SEED}.{base} Methods whose bars overlap widely are not told apart by these seeds; "
        "the paired differences are the sharper comparison."
    )
    alt = f"{metric} of each method: " + "; ".join(
        f"{column_label(column)}: "
        + ", ".join(
            f"{variant_label(variant)} {scores.cells[variant, column].summary.mean:.1f}"
            for variant in scores.variants
            if (variant, column) in scores.cells
        )
        for column in scores.columns
    )
    return Picture(f"scores{suffix}", "Scores", caption, alt, lambda: _draw_scores(numbers, scores, metric))


def _draw_scores(numbers: StudyNumbers, scores: ModelScores, metric: str) -> Any:
    look = styles(scores.trained, numbers.reference)
    rows = scores.trained
    columns = 2 if len(scores.columns) > 1 else 1
    figure, grid = panels(
        len(scores.columns), columns, width=WIDTH, height=1.1 + 0.36 * len(rows), sharey=True
    )
    for axes, column in zip(grid, scores.columns, strict=True):
        for row, variant in enumerate(rows):
            cell = scores.cells.get((variant, column))
            if cell is None:
                continue
            style, s = look[variant], cell.summary
            axes.plot(list(cell.values.values()), [row + 0.22] * s.n, ".", color=GRAY, markersize=6)
            if s.low is not None and s.high is not None:
                axes.plot([s.low, s.high], [row - 0.08] * 2, color=style.color, linewidth=2)
            axes.plot(s.mean, row - 0.08, style.marker, color=style.color, markersize=9)
        if (BASE, column) in scores.cells:
            axes.axvline(scores.cells[BASE, column].summary.mean, color=INK, linestyle=":", linewidth=1.5)
        _rows(axes, [variant_label(variant) for variant in rows])
        axes.set_title(column_label(column), fontsize=FONT)
        axes.grid(axis="x", color="#e5e5e5")
    figure.supxlabel(f"{metric}, %", fontsize=FONT)
    return figure


def _difference_picture(numbers: StudyNumbers, scores: ModelScores, suffix: str) -> Picture | None:
    found = [c for c in numbers.comparisons if c.model == scores.model]
    if not found or numbers.reference is None:
        return None
    reference = variant_label(numbers.reference)
    several = any(c.difference.n > 1 for c in found)
    bars = (
        "Error bars: 95% t interval of the paired difference, not corrected for the number of bars (the comparison "
        "table has the corrected p values); gray: the interval holds zero"
        if several
        else ONE_SEED
    )
    caption = (
        f"What each method gains or loses against {reference} on {scores.model}, in points, over the seeds that both "
        f"have ({_pairs_text(found)}). Left of zero: worse than {reference}. {bars}. "
        f"Numbers at the right: the difference."
    )
    alt = f"Difference to {reference} in points: " + "; ".join(
        f"{variant_label(c.variant)} on {column_label(c.column)} {c.difference.mean:+.2f}" for c in found
    )
    return Picture(
        f"differences{suffix}",
        f"Differences to {reference}",
        caption,
        alt,
        lambda: _draw_differences(found, scores, reference),
    )


def _draw_differences(found: Sequence[Comparison], scores: ModelScores, reference: str) -> Any:
    columns = [column for column in scores.columns if any(c.column == column for c in found)]
    rows = [variant for variant in scores.trained if any(c.variant == variant for c in found)]
    figure, grid = panels(
        len(columns), 2 if len(columns) > 1 else 1, height=1.1 + 0.36 * len(rows), sharey=True
    )
    for axes, column in zip(grid, columns, strict=True):
        ends = [0.0]
        for c in (c for c in found if c.column == column):
            row, d = rows.index(c.variant), c.difference
            low, high = (d.mean, d.mean) if d.low is None or d.high is None else (d.low, d.high)
            ends += [low, high, d.mean]
            sure = d.low is None or low > 0 or high < 0
            color = (BLUE if d.mean > 0 else VERMILION) if sure else "#bdbdbd"
            axes.barh(row, d.mean, height=0.62, color=color)
            if d.low is not None:
                axes.plot([low, high], [row] * 2, color=INK, linewidth=1.6)
                axes.plot([low, high], [row] * 2, "|", color=INK, markersize=9)
            axes.annotate(
                f"{d.mean:+.1f}".replace("-", "−"),
                (1.02, row),
                xycoords=("axes fraction", "data"),
                va="center",
                fontsize=FONT - 1,
            )
        span = max(ends) - min(ends) or 1.0
        axes.set_xlim(min(ends) - 0.05 * span, max(ends) + 0.05 * span)
        axes.axvline(0, color=INK, linewidth=1.2)
        _rows(axes, [variant_label(variant) for variant in rows])
        axes.set_title(column_label(column), fontsize=FONT)
    figure.supxlabel(f"difference to {reference}, points", fontsize=FONT)
    return figure


def _efficiency_picture(numbers: StudyNumbers, scores: ModelScores, suffix: str) -> Picture | None:
    axes_of = [
        (name, label)
        for name, label in (
            ("num_trained", "trained parameters, millions"),
            ("tokens_per_second", "tokens per second in training"),
        )
        if len(_efficiency_points(scores, name)) > 1
    ]
    if not axes_of:
        return None
    what = "the average over tasks" if scores.overall == AVERAGE else column_label(scores.overall)
    several = any(
        scores.cells[v, scores.overall].summary.n > 1 for v, _ in _efficiency_points(scores, axes_of[0][0])
    )
    left_out = [v for v in scores.trained if (v, scores.overall) not in scores.cells]
    better = {
        "num_trained": "Against parameters, the upper left is better",
        "tokens_per_second": "Against speed, the upper right is better; the speed is that of these runs' machine",
    }
    caption = (
        f"Accuracy of {scores.model} ({what}) against what a method costs, {seeds_text(scores)}. "
        f"{'. '.join(better[name] for name, _ in axes_of)}. {BARS if several else ONE_SEED}."
    )
    if left_out:
        caption += f" Without a score on every task, so not shown: {', '.join(map(variant_label, left_out))}."
    alt = "Accuracy against cost: " + "; ".join(
        f"{variant_label(v)} {scores.cells[v, scores.overall].summary.mean:.1f} at {x:,.0f} {label}"
        for name, label in axes_of
        for v, x in _efficiency_points(scores, name)
    ).replace("trained parameters, millions", "trained parameters")
    return Picture(
        f"efficiency{suffix}",
        "Accuracy against cost",
        caption,
        alt,
        lambda: _draw_efficiency(numbers, scores, axes_of, what),
    )


def _efficiency_points(scores: ModelScores, name: str) -> list[tuple[str, float]]:
    points = []
    for variant in scores.trained:
        value = metric_mean(variant_runs(scores, variant), name)
        if value and (variant, scores.overall) in scores.cells:
            points.append((variant, value))
    return points


def _draw_efficiency(
    numbers: StudyNumbers, scores: ModelScores, axes_of: Sequence[tuple[str, str]], what: str
) -> Any:
    look = styles(scores.trained, numbers.reference)
    figure, grid = panels(len(axes_of), 2, height=4.6, sharey=True)
    handles: dict[str, Any] = {}
    for axes, (name, label) in zip(grid, axes_of, strict=True):
        points = _efficiency_points(scores, name)
        scale = 1e-6 if name == "num_trained" else 1
        for variant, value in points:
            style, s = look[variant], scores.cells[variant, scores.overall].summary
            half = 0.0 if s.high is None else s.high - s.mean
            handles[variant] = axes.errorbar(
                value * scale,
                s.mean,
                yerr=half or None,
                fmt=style.marker,
                color=style.color,
                markersize=11,
                linewidth=1.6,
                markeredgecolor="white",
            )
        values = [value * scale for _, value in points]
        if name == "num_trained" and max(values) > 3 * min(values):
            _log_axis(axes)
        else:
            axes.margins(x=0.12)
        axes.set_xlabel(label, fontsize=FONT)
        axes.grid(color="#e5e5e5")
    metric = METRICS.get(numbers.metric, numbers.metric)
    grid[0].set_ylabel(f"{metric}, %\n({what})", fontsize=FONT)
    shown = [variant for variant in scores.trained if variant in handles]
    legend(figure, [handles[variant] for variant in shown], [variant_label(variant) for variant in shown])
    return figure


def _log_axis(axes: Any) -> None:
    from matplotlib.ticker import FuncFormatter, LogLocator, NullFormatter

    axes.set_xscale("log")
    axes.margins(x=0.15)
    axes.xaxis.set_major_locator(LogLocator(subs=(1.0, 2.0, 5.0)))
    axes.xaxis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:g}"))
    axes.xaxis.set_minor_formatter(NullFormatter())


def _rows(axes: Any, labels: Sequence[str]) -> None:
    axes.set_yticks(range(len(labels)), labels, fontsize=FONT)
    axes.set_ylim(len(labels) - 0.4, -0.6)
    axes.tick_params(axis="y", length=0)


def _pairs_text(found: Sequence[Comparison]) -> str:
    low, high = min(c.difference.n for c in found), max(c.difference.n for c in found)
    return f"{low} to {high} seeds" if low < high else f"{high} seed{'' if high == 1 else 's'}"
