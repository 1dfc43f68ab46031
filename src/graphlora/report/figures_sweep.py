"""Picture of sensitivity: what changing one setting of the reference does to accuracy."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from graphlora.report.aggregate import Comparison, ModelScores, StudyNumbers
from graphlora.report.names import AVERAGE, difference_unit, listed, task_label, variant_label
from graphlora.report.numerals import extremes
from graphlora.report.plotting import BLUE, FONT, INK, Picture, legend, panels
from graphlora.report.sweep import UNNAMED, Panel, sweep_panels

TASK_STYLES = (
    ("#D55E00", "s", "--"),
    ("#009E73", "^", "-."),
    ("#CC79A7", "D", ":"),
    ("#E69F00", "v", "--"),
    ("#56B4E9", "P", "-."),
    ("#222222", "X", ":"),
)
# Farthest place of a task's mark beside its setting; neighbors are 1 apart.
REACH = 0.3


def sweep_picture(numbers: StudyNumbers, scores: ModelScores, suffix: str) -> Picture | None:
    """One panel per setting that variants change alone; `None` where there is none.

    Args:
        numbers: Numbers of the study.
        scores: Those of one model.
        suffix: End of the picture's name.
    """
    found = sweep_panels(scores, numbers.reference)
    if not found or numbers.reference is None:
        return None
    differences = {(c.variant, c.column): c for c in numbers.comparisons if c.model == scores.model}
    counts = {c.difference.n for panel in found for _, v in panel.points for c in _of(differences, v)}
    if not counts:
        return None
    seeds = f"{min(counts)} to {max(counts)}" if len(counts) > 1 else f"{max(counts)}"
    reference = variant_label(numbers.reference)
    several = len(scores.tasks) > 1
    unit = difference_unit(numbers.metric)
    bars = (
        "bars: 95% t interval of the paired difference" if max(counts) > 1 else "no error bars for one seed"
    )
    lines = (
        "Blue: average over tasks; smaller marks beside it: single tasks, without bars"
        if several
        else "One task"
    )
    caption = (
        f"What changing one setting of {reference} does on {scores.model}: difference to {reference} (large ring, "
        f"zero by definition) in {unit} over {seeds} shared seed{'' if counts == {1} else 's'}; {bars}. {lines}. "
        "A flat line means that the setting hardly matters; settings are evenly spaced, whatever their values."
    )
    if any(value == UNNAMED for panel in found for value, _ in panel.points):
        caption += f" '{UNNAMED}': the preset's own value, which the records do not name."
    means = {
        variant: differences[variant, scores.overall].difference.mean
        for panel in found
        for _, variant in panel.points
        if (variant, scores.overall) in differences
    }
    alt = f"A panel for each of these settings: {listed(panel.label for panel in found)}. "
    if means:
        alt += f"The differences to {reference} go {extremes(means, 2, signs=True)} {unit}. "
    alt += "All are in the table Comparison."
    return Picture(
        f"sensitivity{suffix}",
        "Sensitivity",
        caption,
        alt,
        lambda: _draw(found, scores, differences, numbers.reference, unit),
    )


def _of(differences: dict[tuple[str, str], Comparison], variant: str) -> list[Comparison]:
    return [c for (name, _), c in differences.items() if name == variant]


def _draw(
    found: Sequence[Panel],
    scores: ModelScores,
    differences: dict[tuple[str, str], Comparison],
    reference: str | None,
    unit: str,
) -> Any:
    figure, grid = panels(len(found), 3, height=3.5, sharey=True)
    handles: dict[str, Any] = {}
    for axes, panel in zip(grid, found, strict=True):
        axes.axhline(0, color=INK, linewidth=1)
        ordinal = panel.field not in ("graph_seed", "edge_init")
        singles = scores.tasks if len(scores.tasks) > 1 else ()
        for index, task in enumerate(singles):
            color, marker, line = TASK_STYLES[index % len(TASK_STYLES)]
            points = _points(panel, task, differences, reference if ordinal else None)
            beside = _beside(index, len(singles))
            (handles[task],) = axes.plot(
                [x + beside for x, _, _ in points],
                [y for _, y, _ in points],
                linestyle=line if ordinal else "none",
                marker=marker,
                color=color,
                linewidth=1.2,
                markersize=8,
                markeredgecolor="white",
                zorder=4.5,
            )
        points = _points(panel, scores.overall, differences, reference)
        handles[scores.overall] = axes.errorbar(
            [x for x, _, _ in points],
            [y for _, y, _ in points],
            yerr=[half for _, _, half in points],
            fmt="o-" if ordinal else "o",
            color=BLUE,
            linewidth=2.6,
            markersize=8,
            capsize=4,
            zorder=4,
        )
        own = [variant for _, variant in panel.points].index(str(reference))
        axes.plot(
            own, 0, "o", color=BLUE, markerfacecolor="white", markersize=13, markeredgewidth=2.4, zorder=5
        )
        _setting_ticks(axes, panel)
        axes.set_title(panel.label, fontsize=FONT)
        axes.grid(axis="y", color="#e5e5e5")
    figure.supylabel(f"difference, {unit}", fontsize=FONT)
    names = [scores.overall, *(task for task in scores.tasks if task in handles and task != scores.overall)]
    labels = ["average over tasks" if name == AVERAGE else task_label(name) for name in names]
    legend(figure, [handles[name] for name in names], labels)
    return figure


def _beside(index: int, count: int) -> float:
    """How far to the side of a setting the mark of a task stands: left and right of the average's, never on it."""
    left = (count + 1) // 2
    step = REACH / left
    return step * (index - left if index < left else index - left + 1)


def _setting_ticks(axes: Any, panel: Panel) -> None:
    words = any(not value.replace(".", "").isdigit() for value, _ in panel.points)
    ticks = [value for value, _ in panel.points]
    axes.set_xticks(range(len(ticks)), ticks, rotation=0 if words or len(ticks) <= 8 else 60)
    if words:  # on two levels, so that neighbors have room
        for tick in axes.xaxis.get_major_ticks()[1::2]:
            tick.set_pad(4 + 1.3 * FONT)
    axes.set_xlim(-0.5, len(panel.points) - 0.5)


def _points(
    panel: Panel,
    column: str,
    differences: dict[tuple[str, str], Comparison],
    reference: str | None,
) -> list[tuple[int, float, float]]:
    """(place, difference, half width of its interval) of the settings that have one; zero for the reference."""
    points = []
    for place, (_, variant) in enumerate(panel.points):
        if variant == reference:
            points.append((place, 0.0, 0.0))
        elif (variant, column) in differences:
            d = differences[variant, column].difference
            points.append((place, d.mean, 0.0 if d.high is None else d.high - d.mean))
    return points
