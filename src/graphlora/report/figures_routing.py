"""Pictures of routing health; here dead experts, ties and overlap by method."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from graphlora.report.aggregate import ModelScores, StudyNumbers
from graphlora.report.figures_balance import balance_picture
from graphlora.report.names import task_label, variant_label
from graphlora.report.numerals import extremes
from graphlora.report.plotting import FONT, WIDTH, Picture, legend, panels, task_look
from graphlora.report.routing import RoutingHealth, routing_health

TOTALS = (
    ("dead_by_run", "dead experts per run"),
    ("ties_by_run", "ties, % of tokens"),
    ("overlap_by_run", "overlap of experts"),
)


def routing_pictures(numbers: StudyNumbers, scores: ModelScores, suffix: str) -> list[Picture]:
    """The two pictures of routing; none where no variant has experts.

    Args:
        numbers: Numbers of the study.
        scores: Those of one model.
        suffix: End of the pictures' names.
    """
    found = routing_health(scores)
    if not found:
        return []
    low, high = min(health.n for health in found), max(health.n for health in found)
    seeds = f"{low} to {high} seeds" if low < high else f"{high} seed{'' if high == 1 else 's'}"
    by_layer = [health for health in found if any(value is not None for value in health.cv)]
    pictures = []
    if by_layer:
        pictures.append(balance_picture(numbers, scores, by_layer, seeds, suffix))
    if any(getattr(health, name) for health in found for name, _ in TOTALS):
        pictures.append(_total_picture(scores, found, seeds, suffix))
    return pictures


def _total_picture(scores: ModelScores, found: Sequence[RoutingHealth], seeds: str, suffix: str) -> Picture:
    caption = (
        "Dead experts (all layers together), tokens whose choice of experts hangs on rounding to bfloat16, and "
        f"overlap (mean absolute cosine between the experts' updates; 0: they do different things) on {scores.model}, "
        f"{seeds}. "
        "Mark: mean; bar: from the lowest to the highest seed. Further left is healthier."
    )
    dead: dict[str, float] = {}
    for health in found:
        if health.dead is not None:
            dead[health.variant] = max(dead.get(health.variant, 0.0), health.dead)
    alt = f"A row for each of {len({h.variant for h in found})} methods with experts, a mark for each task. "
    if dead:
        alt += f"Dead experts per run on the worst task go {extremes(dead)}. "
    alt += "All numbers are in the table Routing health."
    return Picture(
        f"experts{suffix}",
        "Dead experts, ties and overlap",
        caption,
        alt,
        lambda: _draw_totals(scores, found),
    )


def _draw_totals(scores: ModelScores, found: Sequence[RoutingHealth]) -> Any:
    rows = [variant for variant in scores.trained if any(h.variant == variant for h in found)]
    tasks = [task for task in scores.tasks if any(h.task == task for h in found)]
    shown = [(name, label) for name, label in TOTALS if any(getattr(h, name) for h in found)]
    look = task_look(tasks)
    figure, grid = panels(
        len(shown), 3, width=WIDTH, height=1.6 + 0.2 * len(rows) * max(2, len(tasks)), sharey=True
    )
    handles: dict[str, Any] = {}
    for axes, (name, label) in zip(grid, shown, strict=True):
        for health in found:
            values = getattr(health, name)
            if not values:
                continue
            place = tasks.index(health.task)
            y = rows.index(health.variant) + 0.7 * ((place + 0.5) / len(tasks) - 0.5)
            color, _, marker = look[health.task]
            axes.plot([min(values), max(values)], [y, y], color=color, linewidth=2)
            (handles[health.task],) = axes.plot(
                sum(values) / len(values),
                y,
                marker,
                color=color,
                markersize=8,
                linestyle="none",
            )
        axes.set_yticks(range(len(rows)), [variant_label(variant) for variant in rows], fontsize=FONT)
        axes.set_ylim(len(rows) - 0.4, -0.6)
        axes.tick_params(axis="y", length=0)
        right = max((max(getattr(h, name)) for h in found if getattr(h, name)), default=0.0)
        axes.set_xlim(-0.04 * (right or 1.0), 1.08 * (right or 1.0))
        _few_ticks(axes.xaxis, whole=name == "dead_by_run")
        for row in range(1, len(rows)):
            axes.axhline(row - 0.5, color="#e5e5e5", linewidth=1)
        axes.set_title(label, fontsize=FONT)
    legend(figure, [handles[task] for task in tasks if task in handles], [task_label(task) for task in tasks])
    return figure


def _few_ticks(axis: Any, most: int = 4, whole: bool = False) -> None:
    from matplotlib.ticker import MaxNLocator

    axis.set_major_locator(MaxNLocator(nbins=most, integer=whole))
