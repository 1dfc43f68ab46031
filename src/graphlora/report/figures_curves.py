"""Pictures of training: loss and validation over the steps, mean and range over seeds."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Mapping, Sequence
from typing import Any

from graphlora.report.aggregate import ModelScores, StudyNumbers
from graphlora.report.inference import mean
from graphlora.report.names import listed, variant_label
from graphlora.report.plotting import FONT, Picture, bottom_label, legend, panels, styles
from graphlora.report.reading import Run
from graphlora.report.tables import column_label, seeds_text

# The names that curves may have, with the label of their axis and the factor to it.
ROWS = (
    (("loss",), "training loss", 1.0),
    (("eval_loss",), "validation loss", 1.0),
    (("eval_acc_norm", "eval_acc"), "validation, %", 100.0),
)
# Curves whose ends differ by this factor are drawn on a logarithmic scale.
FAR_APART = 5.0
# Bands of more methods than that lie on one another and darken the lines.
MOST_BANDS = 4
# Of more methods than that, no color tells the lines apart: all but a few are gray.
MOST_LINES = 8
# Of those few: the best and as many of the worst.
ENDS = 2
OTHERS_GRAY = "#b8b8b8"
Band = list[tuple[int, float, float, float]]


def curve_picture(numbers: StudyNumbers, scores: ModelScores, suffix: str) -> Picture | None:
    """Training loss and validation accuracy over the steps; `None` where no run recorded any.

    Args:
        numbers: Numbers of the study.
        scores: Those of one model.
        suffix: End of the picture's name.
    """
    bands = {
        (row, task, variant): band
        for row, (names, _, scale) in enumerate(ROWS)
        for task in scores.tasks
        for variant in scores.trained
        if len(band := curve_band(scores.runs.get((variant, task), ()), names, scale)) > 1
    }
    if not bands:
        return None
    several = any(cell.summary.n > 1 for cell in scores.cells.values())
    what = {row for row, _, _ in bands}
    shown = listed(ROWS[row][1].replace(", %", " accuracy") for row in sorted(what))
    caption = (
        f"{shown[0].upper()}{shown[1:]} of {scores.model} over the training steps, {seeds_text(scores)}. "
        + (_band_text(numbers, bands) if several else "One seed each, so no bands. ")
        + "A method that learns faster is lower in loss and higher in accuracy at the same step. Training loss holds "
        "a method's auxiliary losses, so that its level compares only methods with the same ones; validation compares "
        "all."
    )
    drawn = list(dict.fromkeys(variant for _, _, variant in bands))
    colored = _colored(numbers, scores, drawn)
    if len(colored) < len(drawn):
        caption += (
            f" In color: {_choice_text(numbers, colored)}; gray: the other {len(drawn) - len(colored)} methods, "
            "which leave a panel where they are far from these."
        )
    alt = (
        f"A panel for each task and each of {shown}; a line for each of {len(drawn)} methods over the training steps. "
        "Their test scores are in the table Scores, their differences in the table Comparison."
    )
    return Picture(
        f"curves{suffix}",
        "Training curves",
        caption,
        alt,
        lambda: _draw(numbers, scores, bands, sorted(what), colored),
    )


def _band_text(numbers: StudyNumbers, bands: Mapping[tuple[int, str, str], Band]) -> str:
    drawn, banded = {variant for _, _, variant in bands}, _banded(numbers, bands)
    if not banded:
        return "Lines: means; bands of so many methods would hide them. "
    only = f" of {variant_label(banded[0])} (those of so many methods would hide the lines)"
    return (
        f"Line: mean; band: from the lowest to the highest seed{only if len(banded) < len(drawn) else ''}. "
    )


def _banded(numbers: StudyNumbers, bands: Mapping[tuple[int, str, str], Band]) -> list[str]:
    """The variants whose range over seeds is drawn: all, or of too many the reference alone."""
    drawn = list(dict.fromkeys(variant for _, _, variant in bands))
    return drawn if len(drawn) <= MOST_BANDS else [v for v in drawn if v == numbers.reference]


def _colored(numbers: StudyNumbers, scores: ModelScores, drawn: Sequence[str]) -> list[str]:
    """The variants that have a color: all, or of too many the reference and the ends of the others' scores."""
    if len(drawn) <= MOST_LINES:
        return list(drawn)
    means = {
        variant: scores.cells[variant, scores.overall].summary.mean
        for variant in drawn
        if variant != numbers.reference and (variant, scores.overall) in scores.cells
    }
    ranked = sorted(means, key=lambda variant: means[variant])
    kept = {numbers.reference, *ranked[:ENDS], *ranked[-ENDS:]}
    return [variant for variant in drawn if variant in kept]


def _choice_text(numbers: StudyNumbers, colored: Sequence[str]) -> str:
    reference = [variant_label(variant) for variant in colored if variant == numbers.reference]
    return listed([*reference, f"the {ENDS} methods of highest and {ENDS} of lowest score"])


def curve_band(runs: Sequence[Run], names: Sequence[str], scale: float = 1.0) -> Band:
    """Mean, lowest and highest value by step, over the runs.

    Args:
        runs: Runs of one variant on one task.
        names: Names of the quantity; the first that a point has counts.
        scale: Factor.

    Returns:
        (step, mean, lowest, highest) at the steps that at least half of the runs have, ascending.
    """
    by_step: dict[int, list[float]] = defaultdict(list)
    for run in runs:
        for point in run.record.metrics.get("curve") or []:
            value = next((point[name] for name in names if point.get(name) is not None), None)
            if value is not None and point.get("step") is not None:
                by_step[int(point["step"])].append(scale * float(value))
    most = max(map(len, by_step.values()), default=0)
    return [
        (step, mean(values), min(values), max(values))
        for step, values in sorted(by_step.items())
        if 2 * len(values) >= most
    ]


def _draw(
    numbers: StudyNumbers,
    scores: ModelScores,
    bands: Mapping[tuple[int, str, str], Band],
    rows: Sequence[int],
    colored: Sequence[str],
) -> Any:
    look = styles(colored, numbers.reference)
    places = [(row, task) for task in scores.tasks for row in rows]
    figure, grid = panels(len(places), len(rows), height=3.2)
    banded = _banded(numbers, bands)
    handles: dict[str, Any] = {}
    for axes, (row, task) in zip(grid, places, strict=True):
        for variant in colored:
            if band := bands.get((row, task, variant)):
                steps, middle, low, high = zip(*band, strict=True)
                style = look[variant]
                if variant in banded:
                    axes.fill_between(steps, low, high, color=style.color, alpha=0.15, linewidth=0)
                (handles[variant],) = axes.plot(
                    steps, middle, style.line, color=style.color, linewidth=style.width, zorder=3
                )
        ends = [band[-1][1] for variant in colored if (band := bands.get((row, task, variant)))]
        apart = bool(ends) and 0 < FAR_APART * min(ends) < max(ends)
        if apart:
            axes.set_yscale("log")
        limits = axes.get_ylim()
        for variant in scores.trained:
            if variant not in colored and (band := bands.get((row, task, variant))):
                steps, middle, _, _ = zip(*band, strict=True)
                (handles["others"],) = axes.plot(steps, middle, color=OTHERS_GRAY, linewidth=1.2, zorder=2)
                # The axes fit the colored lines.
                axes.set_ylim(limits)
        name = f"{ROWS[row][1]}, log scale" if apart else ROWS[row][1]
        axes.set_title(f"{column_label(task)}: {name}", fontsize=FONT)
        axes.grid(axis="y", color="#e5e5e5")
    bottom_label(grid, len(rows), "training step")
    shown = [variant for variant in colored if variant in handles]
    labels = [variant_label(variant) for variant in shown]
    if gray := handles.get("others"):
        legend(figure, [*(handles[variant] for variant in shown), gray], [*labels, "others"])
    else:
        legend(figure, [handles[variant] for variant in shown], labels)
    return figure
