"""Picture of balance: how evenly each layer's experts are used, a panel per method."""

from __future__ import annotations

import textwrap
from collections.abc import Sequence
from typing import Any

from graphlora.report.aggregate import ModelScores, StudyNumbers
from graphlora.report.names import task_label, variant_label
from graphlora.report.numerals import extremes
from graphlora.report.plotting import FONT, INK, Picture, legend, panels, task_look
from graphlora.report.routing import RoutingHealth

# The load is called balanced up to this coefficient of variation.
BALANCED = 0.25
# The axis of variation holds at least these decades; a smaller value stands at its lower end.
LOWEST, HIGHEST = 0.01, 1.0
COLUMNS = 4
# Height of the panels of variation and of entropy, relative to their mean.
HEIGHTS = (1.2, 0.8)
BEHIND = "#c4c4c4"
Points = list[tuple[int, float]]


def balance_picture(
    numbers: StudyNumbers, scores: ModelScores, found: Sequence[RoutingHealth], seeds: str, suffix: str
) -> Picture:
    """Variation of load and entropy by layer.

    Args:
        numbers: Numbers of the study.
        scores: Those of one model.
        found: Routing by task and variant, all with a coefficient of variation.
        seeds: Number of seeds as text.
        suffix: End of the picture's name.
    """
    variants = [variant for variant in scores.trained if any(h.variant == variant for h in found)]
    behind = numbers.reference if numbers.reference in variants and len(variants) > 1 else None
    caption = (
        f"How evenly the experts of each layer of {scores.model} are used, mean over {seeds}; no error bars (the "
        "routing table has the worst layer of any seed). A panel per method, a line per task, all on one scale. Upper "
        "panels: coefficient of variation of the experts' loads on a logarithmic scale; lower is more even, and below "
        f"the dashed line, at {BALANCED}, a layer is called balanced. Lower panels: entropy of the routing, where 1 is "
        "even."
    )
    if any(value is not None and value < LOWEST for health in found for value in health.cv):
        caption += f" Variation below {LOWEST} stands at {LOWEST}."
    if behind:
        caption += f" Gray: {variant_label(behind)}, mean over tasks."
    worst = {v: max(c for h in found if h.variant == v for c in h.cv if c is not None) for v in variants}
    alt = (
        f"Two panels for each of {len(variants)} methods: variation of load and entropy over the layers. The worst "
        f"layer's variation goes {extremes(worst, 2)}, where up to {BALANCED} is called balanced. More is in the table "
        "Routing health."
    )
    return Picture(
        f"balance{suffix}",
        "Load balance by layer",
        caption,
        alt,
        lambda: _draw(scores, found, variants, behind),
    )


def _draw(
    scores: ModelScores, found: Sequence[RoutingHealth], variants: Sequence[str], behind: str | None
) -> Any:
    look = task_look([task for task in scores.tasks if any(health.task == task for health in found)])
    rows = -(-len(variants) // COLUMNS)
    columns = -(-len(variants) // rows)
    places = rows * columns
    ratios = [height for height in HEIGHTS for _ in range(rows)]
    figure, grid = panels(2 * places, columns, height=2.0, sharex=True, height_ratios=ratios)
    handles: dict[str, Any] = {}
    for name, block in (("cv", grid[:places]), ("entropy", grid[places:])):
        for index, (axes, variant) in enumerate(zip(block, variants, strict=False)):
            if behind is not None and variant != behind:
                x, y = zip(*_mean_points(found, behind, name), strict=True)
                (handles["behind"],) = axes.plot(x, y, color=BEHIND, linewidth=4, zorder=1)
            for health in (health for health in found if health.variant == variant):
                color, line, _ = look[health.task]
                if points := _points(health, name):
                    x, y = zip(*points, strict=True)
                    (handles[health.task],) = axes.plot(x, y, linestyle=line, color=color, linewidth=1.8)
            _scale(axes, name, found)
            axes.set_title(textwrap.fill(variant_label(variant), 24), fontsize=FONT)
            axes.tick_params(labelleft=index % columns == 0, labelbottom=index + columns >= len(variants))
            if index % columns == 0:
                axes.set_ylabel("variation of load" if name == "cv" else "entropy", fontsize=FONT)
            if name == "entropy" and index + columns >= len(variants):
                axes.set_xlabel("layer", fontsize=FONT)
        for axes in block[len(variants) :]:
            axes.axis("off")
    shown = [task for task in look if task in handles]
    labels = [task_label(task) for task in shown]
    if behind is not None:
        shown, labels = [*shown, "behind"], [*labels, f"{variant_label(behind)} (mean over tasks)"]
    legend(figure, [handles[name] for name in shown], labels)
    return figure


def _scale(axes: Any, name: str, found: Sequence[RoutingHealth]) -> None:
    from matplotlib.ticker import MaxNLocator, NullFormatter

    axes.xaxis.set_major_locator(MaxNLocator(nbins=4, integer=True))
    axes.grid(axis="y", color="#e5e5e5")
    if name == "entropy":
        axes.set_ylim(-0.03, 1.06)
        axes.set_yticks([0, 0.5, 1], ["0", "0.5", "1"])
        return
    values = [value for health in found for value in health.cv if value]
    ticks = [0.01, 0.05, BALANCED, 1]
    axes.set_yscale("log")
    axes.set_yticks(ticks, [f"{tick:g}" for tick in ticks])
    axes.yaxis.set_minor_formatter(NullFormatter())
    axes.set_ylim(0.8 * LOWEST, 1.3 * max([HIGHEST, *values]))
    axes.axhline(BALANCED, color=INK, linestyle="--", linewidth=1.2, zorder=2)


def _points(health: RoutingHealth, name: str) -> Points:
    """(layer, value) of a quantity; variation not below the end of its axis."""
    lowest = LOWEST if name == "cv" else 0.0
    return [
        (layer, max(lowest, value))
        for layer, value in zip(health.layers, getattr(health, name), strict=True)
        if value is not None
    ]


def _mean_points(found: Sequence[RoutingHealth], variant: str, name: str) -> Points:
    """Mean over tasks of a variant's points."""
    by_layer: dict[int, list[float]] = {}
    for health in (health for health in found if health.variant == variant):
        for layer, value in _points(health, name):
            by_layer.setdefault(layer, []).append(value)
    return [(layer, sum(values) / len(values)) for layer, values in sorted(by_layer.items())]
