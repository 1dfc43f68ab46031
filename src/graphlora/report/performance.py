"""Pictures of measured speed: whole steps, the matrix of one FFN block, and the targets. Plain numbers in, no torch."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from graphlora.errors import GraphLoraError

# Okabe and Ito's colors, which color-blind readers tell apart.
BLUE, ORANGE, GREEN, VERMILION, GRAY = "#0072B2", "#E69F00", "#009E73", "#D55E00", "#999999"
INK = "#222222"
# Large enough to be read at half size.
FONT = 13


@dataclass(frozen=True)
class TargetPoint:
    """One line of the target picture.

    Attributes:
        label: what is measured.
        measured: the value, or None where it is missing.
        must: the largest value that is enough.
        goal: the value aimed at.
        shown: the measured value as text.
    """

    label: str
    measured: float | None
    must: float
    goal: float
    shown: str


def step_time_figure(steps: Mapping[str, Mapping[str, float]], ours: str = "GraphLoRA") -> Any:
    """Bars of step time relative to the frozen model, one panel per model.

    Args:
        steps: by model, time relative to the frozen model by candidate, in the order of drawing.
        ours: candidates whose label starts with it are drawn in blue.

    Raises:
        GraphLoraError: nothing to draw, or matplotlib is not installed.
    """
    if not steps:
        raise GraphLoraError("there are no step times to draw; measure some first")
    rows = max(len(values) for values in steps.values())
    figure, panels = _figure(1, len(steps), (5.6 * len(steps) + 1.5, 1.6 + 0.48 * rows), sharey=False)
    for axes, (title, values) in zip(panels, steps.items(), strict=True):
        labels = list(values)
        colors = [BLUE if label.startswith(ours) else GRAY for label in labels]
        bars = axes.barh(range(len(labels)), list(values.values()), color=colors, height=0.72)
        axes.bar_label(bars, [f"{value:.2f}" for value in values.values()], padding=3, fontsize=FONT)
        axes.set_yticks(range(len(labels)), labels, fontsize=FONT)
        axes.invert_yaxis()
        axes.axvline(1.0, color=INK, linewidth=1)
        axes.set_xlim(0, 1.18 * max(values.values()))
        axes.set_xlabel("step time / frozen model", fontsize=FONT)
        axes.set_title(title, fontsize=FONT)
        axes.spines[["top", "right"]].set_visible(False)
    return figure


def throughput_figure(rates: Mapping[str, Mapping[str, tuple[float, float]]], ours: str = "GraphLoRA") -> Any:
    """Two bars of tokens per second per candidate, launched (light) and compiled, one panel per model.

    Args:
        rates: by model, both rates by candidate, in the order of drawing.
        ours: candidates whose label starts with it are drawn in blue.

    Raises:
        GraphLoraError: nothing to draw, or matplotlib is not installed.
    """
    if not rates:
        raise GraphLoraError("there are no tokens per second to draw; measure some first")
    rows = max(len(values) for values in rates.values())
    figure, panels = _figure(1, len(rates), (6.2 * len(rates) + 1.5, 1.5 + 1.0 * rows), sharey=False)
    for axes, (title, values) in zip(panels, rates.items(), strict=True):
        labels = list(values)
        colors = [BLUE if label.startswith(ours) else GRAY for label in labels]
        for column, (shift, shade) in enumerate(((-0.19, 0.45), (0.19, 1.0))):
            at = [row + shift for row in range(len(labels))]
            bars = axes.barh(
                at, [pair[column] for pair in values.values()], color=colors, height=0.36, alpha=shade
            )
            axes.bar_label(
                bars,
                [f"{pair[column]:,.0f} {('launched', 'compiled')[column]}" for pair in values.values()],
                padding=3,
                fontsize=FONT - 1,
            )
        axes.set_yticks(range(len(labels)), labels, fontsize=FONT)
        axes.invert_yaxis()
        axes.set_xlim(0, 1.5 * max(max(pair) for pair in values.values()))
        axes.set_xlabel("tokens per second", fontsize=FONT)
        axes.set_title(title, fontsize=FONT)
        axes.spines[["top", "right"]].set_visible(False)
    return figure


def ffn_matrix_figure(
    ratios: Mapping[tuple[str, int, int, str], float],
    must: Mapping[int, float],
    goal: Mapping[int, float],
    bounds_at: int,
) -> Any:
    """Dots of the adapted FFN's time relative to the frozen one, over tokens; a panel per model and rank.

    Args:
        ratios: by model, rank, tokens and skew (`"balanced"` or `"skewed"`).
        must: the largest ratio that is enough, by rank.
        goal: the ratio aimed at, by rank.
        bounds_at: tokens for which the two hold; they are drawn there alone.

    Raises:
        GraphLoraError: nothing to draw, or matplotlib is not installed.
    """
    if not ratios:
        raise GraphLoraError("there are no FFN times to draw; measure some first")
    models = sorted({key[0] for key in ratios})
    ranks = sorted({key[1] for key in ratios})
    tokens = sorted({key[2] for key in ratios})
    figure, panels = _figure(len(models), len(ranks), (3.9 * len(ranks) + 1.2, 3.3 * len(models) + 0.6))
    styles = {"balanced": ("o", BLUE), "skewed": ("D", ORANGE)}
    for index, axes in enumerate(panels):
        model, rank = models[index // len(ranks)], ranks[index % len(ranks)]
        for skew, (marker, color) in styles.items():
            points = [
                (i, ratios[key]) for i, t in enumerate(tokens) if (key := (model, rank, t, skew)) in ratios
            ]
            if points:
                x, y = zip(*points, strict=True)
                shift = -0.08 if skew == "balanced" else 0.08
                axes.plot([v + shift for v in x], y, marker, color=color, markersize=9, label=skew, zorder=3)
        if rank in must and bounds_at in tokens:
            ends = (tokens.index(bounds_at) - 0.42, tokens.index(bounds_at) + 0.42)
            axes.hlines(must[rank], *ends, color=VERMILION, linewidth=2.5, label="must")
            axes.hlines(goal[rank], *ends, color=GREEN, linewidth=2.5, linestyle=(0, (2, 1)), label="goal")
        axes.set_xticks(range(len(tokens)), [f"{t:,}" for t in tokens], fontsize=FONT - 1)
        axes.set_xlim(-0.5, len(tokens) - 0.5)
        axes.tick_params(axis="y", labelsize=FONT - 1)
        axes.set_title(f"{model}, r = {rank}", fontsize=FONT)
        axes.spines[["top", "right"]].set_visible(False)
        if index % len(ranks) == 0:
            axes.set_ylabel("time / frozen FFN", fontsize=FONT)
        if index // len(ranks) == len(models) - 1:
            axes.set_xlabel("tokens", fontsize=FONT)
    handles = {
        label: handle
        for axes in panels
        for handle, label in zip(*axes.get_legend_handles_labels(), strict=True)
    }
    figure.legend(
        list(handles.values()),
        list(handles),
        loc="outside upper center",
        ncols=4,
        fontsize=FONT,
        frameon=False,
    )
    return figure


def target_figure(points: Sequence[TargetPoint]) -> Any:
    """One line per target: where the measured value lies between zero, the goal and what is needed (1 on the axis).

    Args:
        points: in the order of drawing, from the top; a target of zero is drawn as met (0) or missed (1.5).

    Raises:
        GraphLoraError: nothing to draw, or matplotlib is not installed.
    """
    if not points:
        raise GraphLoraError("there are no targets to draw; measure some first")
    figure, (axes,) = _figure(1, 1, (14, 1.4 + 0.42 * len(points)))
    axes.axvline(1.0, color=VERMILION, linewidth=1.5)
    right = max([1.3, *(_share(p.measured, p.must) for p in points if p.measured is not None)])
    right = min(right, 2.0) + 0.12
    for row, point in enumerate(points):
        axes.plot([_share(point.goal, point.must)] * 2, [row - 0.3, row + 0.3], color=GREEN, linewidth=3)
        if point.measured is None:
            axes.text(1.02, row, "not measured", va="center", fontsize=FONT - 2, color=GRAY)
            continue
        share = min(_share(point.measured, point.must), right)
        met = point.measured <= point.must
        axes.plot(
            share,
            row,
            "o" if met else "X",
            color=BLUE if met else VERMILION,
            markeredgecolor=BLUE if met else INK,
            markersize=10 if met else 13,
            clip_on=False,
            zorder=3,
        )
        axes.text(right + 0.03, row, point.shown, va="center", fontsize=FONT - 1, color=INK)
    axes.set_yticks(range(len(points)), [p.label for p in points], fontsize=FONT - 1)
    axes.invert_yaxis()
    axes.set_xlim(0, right)
    axes.set_xlabel(
        "measured / must (red line: must; green bar: goal; X: missed)", fontsize=FONT, loc="right"
    )
    axes.spines[["top", "right"]].set_visible(False)
    return figure


def _share(value: float | None, must: float) -> float:
    assert value is not None
    return value / must if must else (0.0 if value <= 0 else 1.5)


def _figure(rows: int, columns: int, size: tuple[float, float], sharey: bool = True) -> tuple[Any, list[Any]]:
    try:
        from matplotlib import pyplot
    except ImportError as error:
        raise GraphLoraError("pictures need matplotlib; run: pip install 'graphlora[plots]'") from error
    figure, panels = pyplot.subplots(
        rows, columns, figsize=size, squeeze=False, sharey=sharey, layout="constrained"
    )
    return figure, list(panels.flat)
