"""Pictures of routing health: balance and entropy by layer; dead experts, ties and overlap by method."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from graphlora.report.aggregate import ModelScores, StudyNumbers
from graphlora.report.names import task_label, variant_label
from graphlora.report.plotting import FONT, INK, WIDTH, Picture, bottom_label, legend, panels, styles
from graphlora.report.routing import RoutingHealth, routing_health
from graphlora.report.tables import column_label

# The load is called balanced up to this coefficient of variation.
BALANCED = 0.25
TASK_COLORS = ("#0072B2", "#D55E00", "#009E73", "#CC79A7", "#E69F00", "#56B4E9", "#222222")
TASK_MARKERS = ("o", "s", "^", "D", "v", "P", "X")
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
        pictures.append(_layer_picture(numbers, scores, by_layer, seeds, suffix))
    if any(getattr(health, name) for health in found for name, _ in TOTALS):
        pictures.append(_total_picture(scores, found, seeds, suffix))
    return pictures


def _layer_picture(
    numbers: StudyNumbers, scores: ModelScores, found: Sequence[RoutingHealth], seeds: str, suffix: str
) -> Picture:
    caption = (
        f"How evenly the experts of each layer of {scores.model} are used, mean over {seeds}; no error bars (the "
        "routing table has the worst layer of any seed). Left: coefficient of variation of the experts' loads, where "
        f"0 is even; below the dashed line, at {BALANCED}, a layer is called balanced. Right: entropy of the routing, "
        "where 1 is even."
    )
    alt = "Largest mean coefficient of variation over the layers: " + "; ".join(
        f"{variant_label(h.variant)} on {task_label(h.task)} {max(v for v in h.cv if v is not None):.2f}"
        for h in found
    )
    return Picture(
        f"balance{suffix}",
        "Load balance by layer",
        caption,
        alt,
        lambda: _draw_layers(numbers, scores, found),
    )


def _draw_layers(numbers: StudyNumbers, scores: ModelScores, found: Sequence[RoutingHealth]) -> Any:
    look = styles(scores.trained, numbers.reference)
    tasks = [task for task in scores.tasks if any(health.task == task for health in found)]
    figure, grid = panels(2 * len(tasks), 2, height=3.2)
    handles: dict[str, Any] = {}
    for index, axes in enumerate(grid):
        task, name = tasks[index // 2], ("cv", "entropy")[index % 2]
        for health in found:
            if health.task != task:
                continue
            style = look[health.variant]
            points = [
                (layer, value)
                for layer, value in zip(health.layers, getattr(health, name), strict=True)
                if value is not None
            ]
            if points:
                x, y = zip(*points, strict=True)
                (handles[health.variant],) = axes.plot(
                    x,
                    y,
                    style.line,
                    color=style.color,
                    linewidth=style.width,
                    marker=style.marker,
                    markersize=4.5,
                )
        label = "variation of load" if name == "cv" else "entropy"
        axes.set_title(f"{column_label(task)}: {label}", fontsize=FONT)
        if name == "cv":
            axes.axhline(BALANCED, color=INK, linestyle="--", linewidth=1.2)
            axes.set_ylim(bottom=0, top=1.08 * max(axes.get_ylim()[1], BALANCED))
        _few_ticks(axes.xaxis, most=6, whole=True)
        axes.grid(axis="y", color="#e5e5e5")
    bottom_label(grid, 2, "layer")
    shown = [variant for variant in scores.trained if variant in handles]
    legend(figure, [handles[variant] for variant in shown], [variant_label(variant) for variant in shown])
    return figure


def _total_picture(scores: ModelScores, found: Sequence[RoutingHealth], seeds: str, suffix: str) -> Picture:
    caption = (
        "Dead experts (all layers together), tokens whose choice of experts hangs on rounding to bfloat16, and "
        f"overlap (mean absolute cosine between the experts' updates; 0: they do different things) on {scores.model}, "
        f"{seeds}. "
        "Mark: mean; bar: from the lowest to the highest seed. Further left is healthier."
    )
    alt = "Means by method: " + "; ".join(
        f"{variant_label(h.variant)} on {task_label(h.task)}: dead {h.dead}, ties {h.tie_percent}%, overlap {h.overlap}"
        for h in _rounded(found)
    )
    return Picture(
        f"experts{suffix}",
        "Dead experts, ties and overlap",
        caption,
        alt,
        lambda: _draw_totals(scores, found),
    )


def _rounded(found: Sequence[RoutingHealth]) -> list[RoutingHealth]:
    from dataclasses import replace

    def short(value: float | None) -> float | None:
        return None if value is None else round(value, 2)

    return [
        replace(h, dead=short(h.dead), tie_percent=short(h.tie_percent), overlap=short(h.overlap))
        for h in found
    ]


def _draw_totals(scores: ModelScores, found: Sequence[RoutingHealth]) -> Any:
    rows = [variant for variant in scores.trained if any(h.variant == variant for h in found)]
    tasks = [task for task in scores.tasks if any(h.task == task for h in found)]
    shown = [(name, label) for name, label in TOTALS if any(getattr(h, name) for h in found)]
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
            color = TASK_COLORS[place % len(TASK_COLORS)]
            axes.plot([min(values), max(values)], [y, y], color=color, linewidth=2)
            (handles[health.task],) = axes.plot(
                sum(values) / len(values),
                y,
                TASK_MARKERS[place % len(TASK_MARKERS)],
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
