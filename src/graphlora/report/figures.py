"""Two pictures of a trained router: how much each expert is used, and how tokens move between experts.

They take plain numbers, as `routing_stats` and `record_routing` of the tuner give them, and import matplotlib
only when one is drawn.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from graphlora.errors import GraphLoraError

# Diverging around the fair share, and safe for color-blind readers.
COLORS = "PuOr_r"
FLOW_CAPTION = (
    "Size and number: load over the fair share. Gray: edges of the expert graph. Red: where tokens go next; an\n"
    "arrow from i to j is routing weight of expert i that expert j of the next FFN block takes over, where it\n"
    "is above an even spread (a ring: j = i); wider is more."
)
INK, EDGE, FLOW = "#222222", "#999999", "#c44e52"


def expert_load_figure(loads: Mapping[str, Sequence[float]], title: str = "Expert load") -> Any:
    """Heat map of expert load, FFN blocks by experts, in units of the fair share 1 / N.

    Args:
        loads: Load of each expert (any positive unit) per FFN block, from the first block to the last. Blocks
            may have different numbers of experts.
        title: Title.

    Returns:
        The matplotlib figure.

    Raises:
        GraphLoraError: No blocks, a block without load, or matplotlib is not installed.
    """
    shares = [_fair_shares(name, load) for name, load in loads.items()]
    if not shares:
        raise GraphLoraError("there are no expert loads to draw; train the adapter first")
    width = max(len(row) for row in shares)
    table = np.full((len(shares), width), np.nan)
    for row, values in enumerate(shares):
        table[row, : len(values)] = values
    figure, axes = _new_figure(2.5 + 0.45 * width, 1.8 + 0.24 * len(shares))
    image = axes.imshow(table, cmap=COLORS, norm=_around_fair(np.nanmax(table)), aspect="auto")
    axes.set_xticks(range(width), [str(expert) for expert in range(width)])
    axes.set_yticks(range(len(shares)), block_labels(list(loads)))
    axes.set_xlabel("expert")
    axes.set_ylabel("FFN block")
    axes.set_title(title)
    figure.colorbar(image, ax=axes, label="load / fair share (1 = even)")
    return figure


def expert_flow_figure(
    adjacency: Sequence[Sequence[float]], load: Sequence[float], flow: Any, title: str = "Expert graph"
) -> Any:
    """Experts on a circle: size by load, gray lines for the graph's edges, red arrows for the flow.

    Args:
        adjacency: Edges between experts of one FFN block [experts, experts], 0 to 1.
        load: Load of each expert of that block [experts].
        flow: `expert_flow` towards the next block [experts, experts], rows sum to 1.
        title: Title.

    Returns:
        The matplotlib figure; its caption says what the arrows mean.

    Raises:
        GraphLoraError: Shapes that do not fit, or matplotlib is not installed.
    """
    edges, moves = np.asarray(adjacency, dtype=float), np.asarray(flow, dtype=float)
    shares = np.asarray(_fair_shares("load", load))
    count = len(shares)
    if edges.shape != (count, count) or moves.shape != (count, count):
        raise GraphLoraError(
            f"the graph is {edges.shape} and the flow {moves.shape}; both must be ({count}, {count})"
        )
    figure, axes = _new_figure(7.0, 6.6)
    angles = [math.pi / 2 - 2 * math.pi * expert / count for expert in range(count)]
    places = np.array([(math.cos(angle), math.sin(angle)) for angle in angles])
    _draw_edges(axes, places, edges)
    _draw_flow(axes, places, moves, shares)
    sizes = 150 + 900 * shares / max(float(shares.max()), 1.0)
    axes.scatter(
        *places.T,
        s=sizes,
        c=shares,
        cmap=COLORS,
        norm=_around_fair(shares.max()),
        edgecolors=INK,
        zorder=3,
    )
    for expert, (x, y) in enumerate(places):
        axes.annotate(
            f"expert {expert}\n{shares[expert]:.2f}x", (1.42 * x, 1.28 * y), ha="center", va="center"
        )
    axes.set_xlim(-1.65, 1.65)
    axes.set_ylim(-1.5, 1.5)
    axes.set_aspect("equal")
    axes.axis("off")
    axes.set_title(title)
    figure.text(0.5, 0.02, FLOW_CAPTION, ha="center", va="bottom", fontsize=8, color=INK)
    return figure


def expert_flow(here: Any, here_weights: Any, there: Any, there_weights: Any, num_experts: int) -> np.ndarray:
    """Share of each expert's routing weight that goes on to each expert of the next FFN block.

    Args:
        here: Experts selected at one block [tokens, K].
        here_weights: Their weights [tokens, K].
        there: Experts selected at the next block, for the same tokens [tokens, K].
        there_weights: Their weights [tokens, K].
        num_experts: N.

    Returns:
        [N, N]; row i sums to 1 where expert i was used, else it is zero.
    """
    flow = np.zeros((num_experts, num_experts))
    first, second = np.asarray(here), np.asarray(there)
    weights = (
        np.asarray(here_weights, dtype=float)[:, :, None] * np.asarray(there_weights, dtype=float)[:, None, :]
    )
    rows = np.broadcast_to(first[:, :, None], weights.shape)
    columns = np.broadcast_to(second[:, None, :], weights.shape)
    np.add.at(flow, (rows, columns), weights)
    total = flow.sum(axis=1, keepdims=True)
    return np.divide(flow, total, out=np.zeros_like(flow), where=total > 0)


def save_figure(figure: Any, path: str | Path) -> Path:
    """Write a figure (.png, .svg, .pdf) and close it.

    Raises:
        GraphLoraError: The place cannot be written.
    """
    from matplotlib import pyplot

    path = Path(path)
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        figure.savefig(path, dpi=150, bbox_inches="tight")
    except OSError as error:
        raise GraphLoraError(
            f"cannot write {path}: {error.strerror or error}; choose another place"
        ) from error
    finally:
        pyplot.close(figure)
    return path


def block_labels(names: Sequence[str]) -> list[str]:
    """Short labels of FFN blocks: the layer's number where each name has one, else the whole name."""
    numbers = [[part for part in name.split(".") if part.isdigit()] for name in names]
    short = [parts[-1] if parts else "" for parts in numbers]
    return short if len(set(short)) == len(names) and all(short) else list(names)


def _around_fair(largest: float) -> Any:
    """Color scale with its middle at the fair share, 0 to at least 2."""
    from matplotlib.colors import TwoSlopeNorm

    return TwoSlopeNorm(vcenter=1.0, vmin=0.0, vmax=max(2.0, float(largest)))


def _fair_shares(name: str, load: Sequence[float]) -> list[float]:
    total = float(sum(load))
    if not load or not total > 0:
        raise GraphLoraError(f"{name} has no expert load; train the adapter first")
    return [float(value) / total * len(load) for value in load]


def _new_figure(width: float, height: float) -> tuple[Any, Any]:
    try:
        from matplotlib import pyplot
    except ImportError as error:
        raise GraphLoraError("pictures need matplotlib; run: pip install 'graphlora[plots]'") from error
    return pyplot.subplots(figsize=(width, height))


def _draw_edges(axes: Any, places: np.ndarray, edges: np.ndarray) -> None:
    for first, second in zip(*np.triu_indices(len(places), k=1), strict=True):
        if edges[first, second] > 0.01:
            axes.plot(
                *places[[first, second]].T, color=EDGE, linewidth=1 + 3 * edges[first, second], zorder=1
            )


def _draw_flow(axes: Any, places: np.ndarray, moves: np.ndarray, shares: np.ndarray) -> None:
    """Arrows of the flow above an even spread; one to itself is a ring around the expert."""
    even = 1 / len(places)
    for source, target in zip(*np.nonzero(moves > 1.25 * even), strict=True):
        strength = float(moves[source, target] - even) * float(min(shares[source], 2.0))
        if source == target:
            axes.scatter(
                *places[[source]].T, s=1700, facecolors="none", edgecolors=FLOW, linewidths=6 * strength
            )
            continue
        axes.annotate(
            "",
            xy=tuple(places[target]),
            xytext=tuple(places[source]),
            arrowprops={
                "arrowstyle": "-|>",
                "color": FLOW,
                "alpha": min(0.9, 0.3 + strength),
                "linewidth": 0.5 + 6 * strength,
                "shrinkA": 16,
                "shrinkB": 16,
                "connectionstyle": "arc3,rad=0.12",
            },
            zorder=2,
        )
