"""Picture of what accuracy costs: against trained parameters and against the speed of training."""

from __future__ import annotations

import math
import re
from collections.abc import Sequence
from typing import Any

from graphlora.report.aggregate import ModelScores, StudyNumbers, metric_mean, variant_runs
from graphlora.report.names import metric_label, variant_label
from graphlora.report.numerals import extremes
from graphlora.report.plotting import BARS, FONT, GRAY, ONE_SEED, Picture, legend, panels, styles
from graphlora.report.speed import SPEED, speed_problem
from graphlora.report.tables import column_text, seeds_text

# Distance of marks side by side, as a share of the values' range.
GAP = 0.022
# Smallest range of an axis, as a share of its values: a narrower one blows up what hardly differs.
NARROW = 0.2


def cost_picture(numbers: StudyNumbers, scores: ModelScores, suffix: str) -> Picture | None:
    """Accuracy against trained parameters and against speed; `None` where fewer than two methods have either.

    Speeds that do not compare are not drawn, and the caption says why.

    Args:
        numbers: Numbers of the study.
        scores: Those of one model.
        suffix: End of the picture's name.
    """
    problem = speed_problem(scores)
    axes_of = [
        (name, label)
        for name, label in (
            ("num_trained", "trained parameters, millions"),
            (SPEED, "tokens per second in training"),
        )
        if len(_points(scores, name)) > 1 and not (name == SPEED and problem)
    ]
    if not axes_of:
        return None
    what = column_text(scores.overall)
    several = any(scores.cells[v, scores.overall].summary.n > 1 for v, _ in _points(scores, axes_of[0][0]))
    left_out = [v for v in scores.trained if (v, scores.overall) not in scores.cells]
    good = "lower" if numbers.metric == "loss" else "upper"
    better = {
        "num_trained": f"Against parameters, the {good} left is better",
        SPEED: f"Against speed, the {good} right is better; the speed is that of these runs' machine",
    }
    caption = (
        f"Accuracy of {scores.model} ({what}) against what a method costs, {seeds_text(scores)}. "
        f"{'. '.join(better[name] for name, _ in axes_of)}. "
        "Marks of almost the same cost stand side by side. "
        f"{BARS if several else ONE_SEED}."
    )
    if problem:
        caption += f" Without accuracy against speed: {problem[0].lower()}{problem[1:]}"
    if size_families([variant for variant, _ in _points(scores, axes_of[0][0])]):
        caption += " Thin lines join one method at several ranks."
    if left_out:
        caption += f" Without a score on every task, so not shown: {', '.join(map(variant_label, left_out))}."
    drawn = {v: scores.cells[v, scores.overall].summary.mean for v, _ in _points(scores, axes_of[0][0])}
    alt = (
        f"A mark for each of {len(drawn)} methods: accuracy upwards, "
        f"{' and '.join(label.split(',')[0] for _, label in axes_of)} to the right. "
        f"Accuracy goes {extremes(drawn)}. The numbers are in the tables Scores and Cost."
    )
    return Picture(
        f"efficiency{suffix}",
        "Accuracy against cost",
        caption,
        alt,
        lambda: _draw(numbers, scores, axes_of, what),
    )


def _points(scores: ModelScores, name: str) -> list[tuple[str, float]]:
    points = []
    for variant in scores.trained:
        value = metric_mean(variant_runs(scores, variant), name)
        if value and (variant, scores.overall) in scores.cells:
            points.append((variant, value))
    return points


def _draw(numbers: StudyNumbers, scores: ModelScores, axes_of: Sequence[tuple[str, str]], what: str) -> Any:
    look = styles(scores.trained, numbers.reference)
    figure, grid = panels(len(axes_of), 2, height=4.6, sharey=True)
    # Marks keep their size where one panel has all the width.
    gap = GAP if len(axes_of) > 1 else 0.75 * GAP
    handles: dict[str, Any] = {}
    for axes, (name, label) in zip(grid, axes_of, strict=True):
        points = _points(scores, name)
        values = [value for _, value in points]
        log = max(values) > 3 * min(values)
        marks: dict[str, tuple[float, float]] = {}
        for (variant, _), place in zip(points, side_by_side(values, log, gap), strict=True):
            style, s = look[variant], scores.cells[variant, scores.overall].summary
            marks[variant] = (place, s.mean)
            handles[variant] = axes.errorbar(
                place,
                s.mean,
                yerr=None if s.high is None else s.high - s.mean,
                fmt=style.marker,
                color=style.color,
                markersize=11,
                linewidth=1.6,
                markeredgecolor="white",
            )
        for variants in size_families([variant for variant, _ in points]):
            line = sorted(marks[variant] for variant in variants)
            axes.plot(*zip(*line, strict=True), color=GRAY, linewidth=1.2, zorder=1)
        _cost_axis(axes, name, values, log)
        if max(values) - min(values) < NARROW * max(values):
            middle = (max(values) + min(values)) / 2
            axes.set_xlim(middle * (1 - 0.6 * NARROW), middle * (1 + 0.6 * NARROW))
        axes.set_xlabel(label, fontsize=FONT)
        axes.grid(color="#e5e5e5")
    grid[0].set_ylabel(f"{metric_label(numbers.metric)}\n({what})", fontsize=FONT)
    shown = [variant for variant in scores.trained if variant in handles]
    legend(figure, [handles[variant] for variant in shown], [variant_label(variant) for variant in shown])
    return figure


def size_families(variants: Sequence[str]) -> list[list[str]]:
    """Variants that are one method at several ranks: `mixlora_r2` and `mixlora_r8`, and `mixlora` itself."""
    families: dict[str, list[str]] = {}
    for variant in variants:
        if found := re.fullmatch(r"(.+)_r\d+", variant):
            families.setdefault(found.group(1), []).append(variant)
    whole = [[*found, *([name] if name in variants else [])] for name, found in families.items()]
    return [family for family in whole if len(family) > 1]


def side_by_side(values: Sequence[float], log: bool = False, gap: float = GAP) -> list[float]:
    """Places on an axis for values, at least a mark's width apart and in sum as near to the values as that allows.

    Args:
        values: Positive values.
        log: Whether the axis is logarithmic.
        gap: Distance of marks, as a share of the values' range.

    Returns:
        Places in the order of `values`.
    """
    there = [math.log(value) if log else value for value in values]
    gap *= max(max(there) - min(there), NARROW * (1.0 if log else max(map(abs, there))))
    order = sorted(range(len(there)), key=lambda index: there[index])
    # Pool adjacent violators: with i gaps taken off the i-th place, places need only not descend.
    blocks: list[tuple[float, int]] = []
    for rank, index in enumerate(order):
        blocks.append((there[index] - rank * gap, 1))
        while len(blocks) > 1 and blocks[-2][0] > blocks[-1][0]:
            (first, n), (second, m) = blocks[-2:]
            blocks[-2:] = [((first * n + second * m) / (n + m), n + m)]
    fitted = [value for value, count in blocks for _ in range(count)]
    places = dict(zip(order, (value + rank * gap for rank, value in enumerate(fitted)), strict=True))
    return [math.exp(places[index]) if log else places[index] for index in range(len(there))]


def _cost_axis(axes: Any, name: str, values: Sequence[float], log: bool) -> None:
    from matplotlib.ticker import FuncFormatter, LogLocator, MaxNLocator, NullFormatter

    unit = 1e6 if name == "num_trained" else 1e3
    sign = "" if name == "num_trained" else "k"
    decades = max(values) > 10 * min(values)
    if log:
        axes.set_xscale("log")
        axes.xaxis.set_major_locator(
            LogLocator(subs=(1.0, 2.0, 5.0) if decades else (1.0, 1.5, 2.0, 3.0, 5.0, 7.0))
        )
        axes.xaxis.set_minor_formatter(NullFormatter())
    else:
        axes.xaxis.set_major_locator(MaxNLocator(nbins=6))
    axes.margins(x=0.12)
    axes.xaxis.set_major_formatter(FuncFormatter(lambda value, _: f"{value / unit:g}{sign}"))
