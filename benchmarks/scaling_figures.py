"""Pictures of `docs/scaling.md` from the cost model of `benchmarks.scaling`. Imports no torch."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from benchmarks.measurement import Measurement
from benchmarks.scaling import memory, step
from benchmarks.scaling_measured import mfu_of_plans
from benchmarks.scaling_page import CLUSTERS, MODELS, MODES
from benchmarks.scaling_plan import Cluster, Plan
from benchmarks.shapes import LLAMA3_8B
from graphlora.report.figures import save_figure
from graphlora.report.plotting import FONT, legend, panels

COLORS = ("#0072B2", "#56B4E9", "#009E73", "#E69F00", "#D55E00", "#CC79A7", "#8a8a8a", "#dddddd")


def draw_figures(measurements: Sequence[Measurement], folder: Path) -> list[Path]:
    """Draw both pictures; their files."""
    mfu = mfu_of_plans(measurements)
    return [
        save_figure(_memory_figure(), folder / "scaling_memory.png"),
        save_figure(_efficiency_figure(mfu), folder / "scaling_efficiency.png"),
    ]


def _memory_figure() -> Any:
    modes, top = [mode for mode in MODES if mode[0] != "hybrid"], 220
    figure, grid = panels(len(MODELS), 3, height=3.8)
    for axes, shape in zip(grid, MODELS, strict=True):
        found = [memory(Plan(shape, 8, mode, bits)) for mode, bits, _ in modes]
        bottom = [0.0] * len(modes)
        for color, part in zip(COLORS, found[0], strict=True):
            values = [parts[part] / 1e9 for parts in found]
            axes.bar(range(len(modes)), values, bottom=bottom, color=color, label=part)
            bottom = [a + b for a, b in zip(bottom, values, strict=True)]
        axes.axhline(Cluster().memory / 1e9, color="#222222", linestyle="--")
        axes.set_ylim(0, top)
        for at, total in enumerate(bottom):
            if total > top:
                axes.text(at, 0.9 * top, f"{total:.0f}", ha="center", fontsize=FONT - 2, color="white")
        axes.set_xticks(range(len(modes)), [label for _, _, label in modes], rotation=45, ha="right")
        axes.set_title(shape.name, fontsize=FONT)
    grid[0].set_ylabel("GB per GPU, 8 GPUs", fontsize=FONT)
    handles, labels = grid[0].get_legend_handles_labels()
    legend(figure, handles, labels)
    return figure


def _efficiency_figure(mfu: float) -> Any:
    figure, grid = panels(2, 2, height=4.0, sharey=True)
    tokens = [256 * 2**power for power in range(8)]
    for axes, gpus in zip(grid, (64, 1024), strict=True):
        for color, cluster in zip(COLORS[::2], CLUSTERS, strict=False):
            for line, mode, label in (
                ("-", "fsdp", "FSDP2"),
                ("--", "hybrid", "per node"),
                (":", "ddp", "DDP"),
            ):
                plans = [
                    Plan(LLAMA3_8B, gpus, mode, tokens=count, length=256, mfu=mfu, cluster=cluster)
                    for count in tokens
                ]
                values = [100 * step(plan).efficiency for plan in plans]
                axes.plot(tokens, values, line, color=color, label=f"{label}, {cluster.name}")
        axes.set_xscale("log", base=2)
        axes.set_title(f"llama3-8b, {gpus} GPUs", fontsize=FONT)
        axes.set_xlabel("tokens per GPU and micro-batch", fontsize=FONT)
    grid[0].set_ylabel("% of the step that computes", fontsize=FONT)
    handles, labels = grid[0].get_legend_handles_labels()
    legend(figure, handles, labels, columns=3)
    return figure
