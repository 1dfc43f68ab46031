"""The look of the pictures of studies: colors, marks, panels, files. Matplotlib is imported when one is drawn."""

from __future__ import annotations

import io
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

from graphlora.errors import GraphLoraError

# Okabe and Ito's colors without the yellow, which is faint on white; the first one is the reference's.
BLUE, ORANGE, GREEN, VERMILION = "#0072B2", "#E69F00", "#009E73", "#D55E00"
SKY, PURPLE, INK, GRAY = "#56B4E9", "#CC79A7", "#222222", "#8a8a8a"
OTHERS = (VERMILION, GREEN, ORANGE, PURPLE, SKY, INK)
MARKERS = ("s", "D", "^", "v", "P", "X", "<", ">", "p", "h")
LINES = ("-", "--", "-.", ":")
TASK_COLORS = (BLUE, VERMILION, GREEN, PURPLE, ORANGE, SKY, INK)
TASK_MARKERS = ("o", "s", "^", "D", "v", "P", "X")
# Large enough to be read at half the size of a page.
FONT = 13
WIDTH = 10.5
BARS = "Bars: 95% t interval over seeds"
ONE_SEED = "One seed each, so there are no error bars"


@dataclass(frozen=True)
class Picture:
    """One picture of a report.

    Attributes:
        name: Short name for its files.
        title: Heading.
        caption: What to see, the number of seeds, and what the error bars mean.
        alt: What it shows, for those who cannot see it.
        draw: Draws it; returns a matplotlib figure.
    """

    name: str
    title: str
    caption: str
    alt: str
    draw: Callable[[], Any]


@dataclass(frozen=True)
class Style:
    """How a variant is drawn in every picture of a study."""

    color: str
    marker: str
    line: str
    width: float


def styles(variants: Sequence[str], reference: str | None) -> dict[str, Style]:
    """A color, mark and line for each variant; no two are alike, also without color."""
    found = {}
    others = [variant for variant in variants if variant != reference]
    for index, variant in enumerate(others):
        found[variant] = Style(
            OTHERS[index % len(OTHERS)],
            MARKERS[index % len(MARKERS)],
            LINES[(index + index // len(OTHERS)) % len(LINES)],
            1.8,
        )
    if reference is not None:
        found[reference] = Style(BLUE, "o", "-", 3.0)
    return found


def task_look(tasks: Sequence[str]) -> dict[str, tuple[str, str, str]]:
    """A color, line and mark for each task where methods have panels or rows of their own."""
    return {
        task: (
            TASK_COLORS[index % len(TASK_COLORS)],
            LINES[index % len(LINES)],
            TASK_MARKERS[index % len(TASK_MARKERS)],
        )
        for index, task in enumerate(tasks)
    }


def panels(
    count: int, columns: int, width: float = WIDTH, height: float = 3.4, **kwargs: Any
) -> tuple[Any, list[Any]]:
    """A figure with panels in rows of equal size; unused places stay empty.

    Args:
        count: Number of panels.
        columns: Most panels in a row.
        width: Width of the figure in inches.
        height: Height of a row in inches.
        kwargs: For `Figure.subplots`.

    Raises:
        GraphLoraError: Matplotlib is not installed.
    """
    try:
        from matplotlib.figure import Figure
    except ImportError as error:
        raise GraphLoraError("pictures need matplotlib; run: pip install 'graphlora[plots]'") from error
    columns = min(columns, count)
    rows = -(-count // columns)
    figure = Figure(figsize=(width, rows * height + 0.3), layout="constrained")
    grid = list(figure.subplots(rows, columns, squeeze=False, **kwargs).flat)
    for axes in grid[count:]:
        axes.axis("off")
    for axes in grid[:count]:
        axes.spines[["top", "right"]].set_visible(False)
        axes.tick_params(labelsize=FONT - 1)
    return figure, grid[:count]


def legend(figure: Any, handles: Sequence[Any], labels: Sequence[str], columns: int = 4) -> None:
    """One legend for all panels, below them, in as many columns as there is room for."""
    from matplotlib.backends.backend_agg import FigureCanvasAgg

    renderer = FigureCanvasAgg(figure).get_renderer()
    for count in range(min(columns, len(labels)), 0, -1):
        drawn = figure.legend(
            handles,
            labels,
            loc="outside lower center",
            ncols=count,
            fontsize=FONT,
            frameon=False,
            handlelength=2.6,
        )
        if count == 1 or drawn.get_window_extent(renderer).width <= figure.bbox.width:
            return
        drawn.remove()


def bottom_label(grid: Sequence[Any], columns: int, text: str) -> None:
    """One label for the horizontal axes, below each panel of the last row.

    A label of the whole figure would lie on a legend outside the panels.
    """
    for axes in grid[-((len(grid) - 1) % columns + 1) :]:
        axes.set_xlabel(text, fontsize=FONT)


def rendered(figure: Any, file_format: str) -> bytes:
    """The figure as a file's content (`"png"` or `"svg"`), the same for the same numbers."""
    import matplotlib
    from matplotlib.layout_engine import ConstrainedLayoutEngine

    if isinstance(figure.get_layout_engine(), ConstrainedLayoutEngine):
        # The layout takes most of the time, and is the same for each format.
        figure.draw_without_rendering()
        figure.set_layout_engine("none")
    buffer = io.BytesIO()
    metadata = {"Date": None, "Creator": None} if file_format == "svg" else {"Software": None}
    with matplotlib.rc_context({"svg.hashsalt": "graphlora", "svg.fonttype": "path"}):
        figure.savefig(buffer, format=file_format, dpi=160, facecolor="white", metadata=metadata)
    return buffer.getvalue()
