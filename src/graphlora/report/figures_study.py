"""Every picture of a study; here those of scores: seeds and means, and differences to the reference."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from graphlora.report.aggregate import Comparison, ModelScores, StudyNumbers
from graphlora.report.figures_cost import cost_picture
from graphlora.report.figures_curves import curve_picture
from graphlora.report.figures_routing import routing_pictures
from graphlora.report.figures_sweep import sweep_picture
from graphlora.report.names import difference_unit, is_share, metric_label, variant_label
from graphlora.report.numerals import extremes, signed
from graphlora.report.plotting import (
    BARS,
    BLUE,
    FONT,
    GRAY,
    INK,
    ONE_SEED,
    VERMILION,
    WIDTH,
    Picture,
    panels,
    styles,
)
from graphlora.report.reading import BASE
from graphlora.report.sweep import sweep_panels
from graphlora.report.tables import column_label, column_text, seeds_text


def study_pictures(numbers: StudyNumbers) -> list[Picture]:
    """Every picture that the study has the numbers for, model by model."""
    pictures = []
    for scores in numbers.models:
        suffix = f"-{scores.model}" if len(numbers.models) > 1 else ""
        swept = {v for panel in sweep_panels(scores, numbers.reference) for _, v in panel.points}
        # A study of settings alone has its picture in the panels, and its numbers in the tables.
        methods = not swept >= set(scores.trained)
        found = [
            _score_picture(numbers, scores, suffix) if methods else None,
            _difference_picture(numbers, scores, suffix) if methods else None,
            sweep_picture(numbers, scores, suffix),
            cost_picture(numbers, scores, suffix),
            curve_picture(numbers, scores, suffix),
            *routing_pictures(numbers, scores, suffix),
        ]
        pictures += [picture for picture in found if picture is not None]
    return pictures


def _score_picture(numbers: StudyNumbers, scores: ModelScores, suffix: str) -> Picture | None:
    metric = metric_label(numbers.metric)
    several = any(cell.summary.n > 1 for cell in scores.cells.values())
    base = " In brackets: the untouched model." if BASE in scores.variants else ""
    caption = (
        f"Scores of {scores.model}, {seeds_text(scores)}. Small dots: one seed each; large mark: their mean. "
        f"{BARS if several else ONE_SEED}.{base} Methods whose bars overlap widely are not told apart by these seeds; "
        "the paired differences are the sharper comparison."
    )
    means = {
        variant: scores.cells[variant, scores.overall].summary.mean
        for variant in scores.trained
        if (variant, scores.overall) in scores.cells
    }
    alt = f"A row for each of {len(scores.trained)} methods, a panel for each task: dots of seeds, and their mean. "
    if means:
        alt += f"The means of {column_text(scores.overall)} go {extremes(means)}. "
    alt += "All are in the table Scores."
    return Picture(
        f"scores{suffix}", "Scores by seed", caption, alt, lambda: _draw_scores(numbers, scores, metric)
    )


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
        _rows(axes, [variant_label(variant) for variant in rows])
        base = scores.cells.get((BASE, column))
        known = f" (base model {base.summary.mean:.1f})" if base else ""
        axes.set_title(f"{column_label(column)}{known}", fontsize=FONT)
        axes.grid(axis="x", color="#e5e5e5")
    figure.supxlabel(metric, fontsize=FONT)
    return figure


def _difference_picture(numbers: StudyNumbers, scores: ModelScores, suffix: str) -> Picture | None:
    found = [c for c in numbers.comparisons if c.model == scores.model]
    if not found or numbers.reference is None:
        return None
    reference = variant_label(numbers.reference)
    unit, better = difference_unit(numbers.metric), "Right" if is_share(numbers.metric) else "Left"
    several = any(c.difference.n > 1 for c in found)
    bars = (
        "Error bars: 95% t interval of the paired difference, not corrected for the number of bars (the comparison "
        f"table has the corrected p values). Gray: the interval holds zero; it does not where the bar is blue (better "
        f"than {reference}) or orange (worse)"
        if several
        else f"{ONE_SEED}, and nothing is certain: gray"
    )
    caption = (
        f"What each method gains or loses against {reference} on {scores.model}, in {unit}, over the seeds that both "
        f"have ({_pairs_text(found)}). {better} of zero: better than {reference}. {bars}. "
        f"Numbers at the right: the difference."
    )
    column = scores.overall if any(c.column == scores.overall for c in found) else found[0].column
    means = {c.variant: c.difference.mean for c in found if c.column == column}
    alt = (
        f"A bar for each method, a panel for each task. The differences to {reference} on {column_text(column)} go "
        f"{extremes(means, 2, signs=True)} {unit}. All are in the table Comparison."
    )
    return Picture(
        f"differences{suffix}",
        f"Differences to {reference}",
        caption,
        alt,
        lambda: _draw_differences(
            found, scores, f"difference to {reference}, {unit}", 1 if is_share(numbers.metric) else -1
        ),
    )


def _draw_differences(found: Sequence[Comparison], scores: ModelScores, label: str, better: int) -> Any:
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
            sure = d.low is not None and (low > 0 or high < 0)
            color = (BLUE if better * d.mean > 0 else VERMILION) if sure else "#bdbdbd"
            axes.barh(row, d.mean, height=0.62, color=color)
            if d.low is not None:
                axes.plot([low, high], [row] * 2, color=INK, linewidth=1.6)
                axes.plot([low, high], [row] * 2, "|", color=INK, markersize=9)
            axes.annotate(
                signed(d.mean, digits=1),
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
    figure.supxlabel(label, fontsize=FONT)
    return figure


def _rows(axes: Any, labels: Sequence[str]) -> None:
    from matplotlib.ticker import MaxNLocator

    # More numbers than that touch each other where differences are hundredths.
    axes.xaxis.set_major_locator(MaxNLocator(nbins=5, steps=[1, 2, 5, 10]))
    axes.set_yticks(range(len(labels)), labels, fontsize=FONT)
    axes.set_ylim(len(labels) - 0.4, -0.6)
    axes.tick_params(axis="y", length=0)


def _pairs_text(found: Sequence[Comparison]) -> str:
    low, high = min(c.difference.n for c in found), max(c.difference.n for c in found)
    return f"{low} to {high} seeds" if low < high else f"{high} seed{'' if high == 1 else 's'}"
