"""From the cost model to `docs/scaling.md`: tables between the page's markers, and pictures. Imports no torch."""

from __future__ import annotations

import json
import re
from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

from benchmarks.measurement import OK, Measurement, latest_attempts
from benchmarks.scaling import (
    ETHERNET,
    FLOAT32,
    SLOW,
    Adapter,
    Cluster,
    Mode,
    Plan,
    collectives,
    compute_seconds,
    first_limit,
    hidden_from,
    memory,
    optimizer_seconds,
    step,
    waiting_share,
    with_global_batch,
)
from benchmarks.shapes import LLAMA3_8B, LLAMA3_70B, LLAMA3_405B, SHAPES, Shape
from graphlora.errors import GraphLoraError
from graphlora.records import write_text
from graphlora.report.figures import save_figure
from graphlora.report.plotting import FONT, legend, panels

MODELS = (LLAMA3_8B, LLAMA3_70B, LLAMA3_405B)
GPUS = (8, 64, 256, 1024)
CLUSTERS = (Cluster(), SLOW, ETHERNET)
MODES: tuple[tuple[Mode, int, str], ...] = (
    ("ddp", 16, "DDP"),
    ("ddp", 4, "DDP, 4-bit"),
    ("fsdp", 16, "FSDP2"),
    ("fsdp", 4, "FSDP2, 4-bit"),
    ("hybrid", 16, "FSDP2 per node"),
    ("hybrid", 4, "FSDP2 per node, 4-bit"),
)
GLOBAL_TOKENS = 2**19
COLORS = ("#0072B2", "#56B4E9", "#009E73", "#E69F00", "#D55E00", "#CC79A7", "#8a8a8a", "#dddddd")
MEASURED = "triton_r8"
Table = Callable[[Sequence[Measurement], dict[str, Any]], str]


def update_page(measurements: Sequence[Measurement], two_gpus: dict[str, Any], page: Path) -> str:
    """Put the tables between the page's markers; a line that says what was written.

    Args:
        measurements: Of steps on one GPU; the newest count.
        two_gpus: Values of `results/reliability/two_gpus.json`; empty where there is none.
        page: `docs/scaling.md`.

    Raises:
        GraphLoraError: A page without one of the markers.
    """
    text = page.read_text(encoding="utf-8")
    for name, make in TABLES.items():
        block = f"<!-- begin {name} -->\n{make(measurements, two_gpus)}\n<!-- end {name} -->"
        pattern = rf"<!-- begin {name} -->.*?<!-- end {name} -->"
        text, count = re.subn(pattern, lambda _, block=block: block, text, flags=re.DOTALL)
        if count != 1:
            raise GraphLoraError(f"{page} has {count} blocks `<!-- begin {name} -->`; it must have one")
    write_text(page, text)
    return f"{page}: {len(TABLES)} tables"


def read_two_gpus(path: Path) -> dict[str, Any]:
    """Values of the record of two GPUs; empty where there is none.

    Raises:
        GraphLoraError: The file is not such a record.
    """
    if not path.is_file():
        return {}
    try:
        return dict(json.loads(path.read_text(encoding="utf-8"))["values"])
    except (ValueError, KeyError, TypeError) as error:
        raise GraphLoraError(f"{path} is not a record of two GPUs ({error}); run it again") from error


def measured_mfu(measurements: Sequence[Measurement]) -> float | None:
    """Share of the peak of data sheets that a whole step of Llama3-8B's shape reached; `None` where unmeasured."""
    for name in ("all layers 8x1024", "8 layers 8x512"):
        found = _values(measurements, f"{LLAMA3_8B.name} {name}")
        if "full" in found:
            plan = _benchmark_plan(LLAMA3_8B, *_sizes(name, LLAMA3_8B))
            return compute_seconds(replace(plan, mfu=1.0)) / (found["full"] / 1e3)
    return None


def draw_figures(measurements: Sequence[Measurement], folder: Path) -> list[Path]:
    """Draw both pictures; their files."""
    mfu = _mfu(measurements)
    return [
        save_figure(_memory_figure(), folder / "scaling_memory.png"),
        save_figure(_efficiency_figure(mfu), folder / "scaling_efficiency.png"),
    ]


def _mfu(measurements: Sequence[Measurement]) -> float:
    return measured_mfu(measurements) or Plan(LLAMA3_8B).mfu


def _adapter_table(measurements: Sequence[Measurement], two_gpus: dict[str, Any]) -> str:
    del measurements, two_gpus
    rows = []
    for shape in MODELS:
        adapter = Adapter()
        trained = adapter.parameters(shape)
        routers = shape.num_layers * adapter.router_parameters(shape)
        loads = [step(Plan(shape, gpus)).loads for gpus in (GPUS[0], GPUS[-1])]
        rows.append(
            (shape.name, f"{shape.num_matmul() / 1e9:.1f} B", f"{trained / 1e6:,.0f} M", f"{routers / 1e6:.0f} M",
             _bytes(FLOAT32 * trained), _bytes(3 * FLOAT32 * trained), f"{adapter.load_bytes(shape):,} B",
             *(f"{1e6 * seconds:.0f} µs" for seconds in loads))
        )  # fmt: skip
    names = (
        "model",
        "weights in products",
        "trained",
        "of these routers",
        "gradients",
        "weights and moments",
        "loads",
    )
    return _table((*names, *(f"their all-reduce, {gpus} GPUs" for gpus in (GPUS[0], GPUS[-1]))), rows)


def _collectives_table(measurements: Sequence[Measurement], two_gpus: dict[str, Any]) -> str:
    del measurements, two_gpus
    rows = []
    kinds: tuple[tuple[Mode, str], ...] = (("ddp", "DDP"), ("fsdp", "FSDP2"), ("hybrid", "FSDP2 per node"))
    for mode, label in kinds:
        plan = Plan(LLAMA3_8B, 64, mode)
        for item in collectives(plan):
            seconds = [item.seconds(cluster) for cluster in CLUSTERS[:2]]
            rows.append(
                (label, item.what, item.kind.replace("_", "-"), f"{item.count}", _bytes(item.num_bytes),
                 f"{item.gpus}", *(f"{1e3 * value:.2f} ms" for value in seconds))
            )  # fmt: skip
    names = (
        "mode",
        "what",
        "collective",
        "per step",
        "bytes",
        "among",
        *(cluster.name for cluster in CLUSTERS[:2]),
    )
    return _table(names, rows)


def _memory_table(measurements: Sequence[Measurement], two_gpus: dict[str, Any]) -> str:
    del measurements, two_gpus
    rows = []
    for shape in MODELS:
        for mode, bits, label in MODES:
            parts = memory(Plan(shape, 8, mode, bits))
            more = memory(Plan(shape, 64, mode, bits))
            total, at_64 = sum(parts.values()), sum(more.values())
            state = parts["adapter"] + parts["gradients"] + parts["optimizer"]
            rows.append(
                (shape.name, label, _bytes(parts["base"] + parts["gathered"]), _bytes(state),
                 _bytes(parts["activations"] + parts["logits"]), _fits(total), _fits(at_64))
            )  # fmt: skip
    names = (
        "model",
        "mode",
        "base",
        "adapter, gradients, moments",
        "activations, logits",
        "8 GPUs",
        "64 GPUs",
    )
    return _table(names, rows)


def _weak_table(measurements: Sequence[Measurement], two_gpus: dict[str, Any]) -> str:
    del two_gpus
    rows = []
    for shape, mode, bits, label in _fitting():
        for cluster in CLUSTERS:
            plans = [Plan(shape, gpus, mode, bits, mfu=_mfu(measurements), cluster=cluster) for gpus in GPUS]
            steps = [step(plan) for plan in plans]
            rows.append(
                (shape.name, label, cluster.name, f"{steps[0].seconds:.2f} s",
                 *(f"{found.efficiency:.1%}" if _has_room(plan) else "no room"
                   for plan, found in zip(plans, steps, strict=True)),
                 f"{steps[-1].tokens_per_second / 1e6:.2f} M/s")
            )  # fmt: skip
    names = ("model", "mode", "network", "step at 8", *(f"{gpus} GPUs" for gpus in GPUS), "tokens at 1024")
    return _table(names, rows)


def _strong_table(measurements: Sequence[Measurement], two_gpus: dict[str, Any]) -> str:
    del two_gpus
    rows = []
    for shape, mode, bits, label in _fitting():
        for cluster in CLUSTERS[:2]:
            cells = []
            for gpus in GPUS:
                plan = Plan(shape, gpus, mode, bits, mfu=_mfu(measurements), cluster=cluster)
                try:
                    plan = with_global_batch(plan, GLOBAL_TOKENS)
                except ValueError:
                    cells.append("fewer rows than GPUs")
                    continue
                found = step(plan)
                limit = first_limit(plan)
                why = "" if limit == "nothing" else f", {limit}"
                cells.append(f"{found.seconds:.2f} s, {found.efficiency:.0%}{why}")
            rows.append((shape.name, label, cluster.name, *cells))
    return _table(("model", "mode", "network", *(f"{gpus} GPUs" for gpus in GPUS)), rows)


def _hidden_table(measurements: Sequence[Measurement], two_gpus: dict[str, Any]) -> str:
    del two_gpus
    mfu = _mfu(measurements)
    rows = []
    for label, gpus, cluster in (("NVLink, one node", 8, CLUSTERS[0]), *((c.name, 64, c) for c in CLUSTERS)):
        values = [
            hidden_from(Plan(LLAMA3_8B, gpus, "fsdp", bits, mfu=mfu, cluster=cluster)) for bits in (16, 4)
        ]
        rows.append((label, *(f"{value:,.0f}" for value in values)))
    return _table(("weights travel over", "tokens, 16-bit base", "tokens, 4-bit base"), rows)


def _waiting_table(measurements: Sequence[Measurement], two_gpus: dict[str, Any]) -> str:
    del measurements, two_gpus
    rows = []
    for variation in (0.02, 0.1, 0.3):
        each = [waiting_share(variation, gpus, 8, each=True) for gpus in (2, *GPUS)]
        once = [waiting_share(variation, gpus, 8, each=False) for gpus in (2, *GPUS)]
        cells = (f"{a:.1%} ({b:.1%})" for a, b in zip(each, once, strict=True))
        rows.append((f"{variation:.0%}", *cells))
    return _table(("a micro-batch's time varies by", *(f"{gpus} GPUs" for gpus in (2, *GPUS))), rows)


def _check_table(measurements: Sequence[Measurement], two_gpus: dict[str, Any]) -> str:
    """The model against what was measured."""
    rows = [*_step_checks(measurements), *_two_gpu_checks(two_gpus)]
    if not rows:
        return "No step has been measured on a GPU yet, so nothing here is checked against one."
    return _table(("what", "model", "measured", "model / measured"), rows)


def _step_checks(measurements: Sequence[Measurement]) -> list[tuple[str, ...]]:
    rows = []
    for shape in (SHAPES["llama3-8b"], SHAPES["qwen2-7b"]):
        cases = {}
        for name in ("8 layers 8x512", "all layers 8x1024"):
            found = _values(measurements, f"{shape.name} {name}")
            if found:
                cases[name] = found, _benchmark_plan(shape, *_sizes(name, shape))
        for name, (found, plan) in cases.items():
            if "peak_memory" in found:
                parts = memory(plan)
                value = sum(parts.values()) - parts["reserved"]
                rows.append(_check(f"{shape.name} {name}: peak memory", value, found["peak_memory"], _bytes))
        if len(cases) == 2 and all("full" in found for found, _ in cases.values()):
            (few, few_plan), (all_layers, plan) = cases.values()
            mfu = compute_seconds(replace(few_plan, mfu=1.0)) / (few["full"] / 1e3)
            value = 1e3 * compute_seconds(replace(plan, mfu=mfu))
            what = f"{shape.name} all layers: step, from the MFU of 8 layers ({mfu:.2f})"
            rows.append(_check(what, value, all_layers["full"], lambda ms: f"{ms:.0f} ms"))
    return rows


def _two_gpu_checks(values: dict[str, Any]) -> list[tuple[str, ...]]:
    """Speed and memory of DDP and FSDP2 on two GPUs, from the speed of one: 8 rows of 1024 tokens for each."""
    found = values.get("scaling", {})
    if values.get("tiny") or "step_seconds" not in found.get("one", {}):
        return []
    plan = Plan(LLAMA3_8B, 1, tokens=8 * 1024, length=1024, checkpointing=False)
    alone = found["one"]["step_seconds"]
    plan = replace(plan, mfu=compute_seconds(replace(plan, mfu=1.0)) / (alone - optimizer_seconds(plan)))
    modes: tuple[tuple[str, Mode], ...] = (("ddp", "ddp"), ("fsdp2", "fsdp"))
    rows = []
    for name, mode in modes:
        both = replace(plan, gpus=2, mode=mode)
        entry = found.get(name, {})
        if "efficiency" in entry:
            value = alone / step(both).seconds
            what = f"two GPUs, {name}: speed of a GPU over that of one alone"
            rows.append(_check(what, value, entry["efficiency"], lambda share: f"{share:.3f}"))
        if "peak_memory" in entry:
            parts = memory(both)
            value = sum(parts.values()) - parts["reserved"]
            rows.append(_check(f"two GPUs, {name}: peak memory", value, entry["peak_memory"], _bytes))
    return rows


def _check(what: str, value: float, measured: float, shown: Callable[[float], str]) -> tuple[str, ...]:
    return what, shown(value), shown(measured), f"{value / measured:.2f}"


def _assumption_table(measurements: Sequence[Measurement], two_gpus: dict[str, Any]) -> str:
    del two_gpus
    found = measured_mfu(measurements)
    source = (
        "assumed; no step was measured on a GPU yet"
        if found is None
        else "measured, one GPU, Llama3-8B's shape"
    )
    return f"Share of the peak that a GPU's step reaches: **{_mfu(measurements):.2f}** ({source})."


TABLES: dict[str, Table] = {
    "mfu": _assumption_table,
    "adapter": _adapter_table,
    "collectives": _collectives_table,
    "memory": _memory_table,
    "weak": _weak_table,
    "strong": _strong_table,
    "hidden": _hidden_table,
    "waiting": _waiting_table,
    "check": _check_table,
}


def _fitting() -> list[tuple[Shape, Mode, int, str]]:
    """Per model the modes worth a row: DDP, FSDP2 and FSDP2 per node, with 16 bits where that fits on 64 GPUs."""
    chosen = []
    for shape in MODELS:
        kinds: tuple[Mode, ...] = ("ddp", "fsdp", "hybrid")
        for kind in kinds:
            fits = [
                (shape, *mode)
                for mode in MODES
                if mode[0] == kind and _has_room(Plan(shape, 64, kind, mode[1]))
            ]
            chosen += fits[:1]
    return chosen


def _has_room(plan: Plan) -> bool:
    return sum(memory(plan).values()) <= plan.cluster.memory


def _fits(num_bytes: float) -> str:
    text = _bytes(num_bytes)
    return text if num_bytes <= Cluster().memory else f"**{text}**"


def _bytes(value: float) -> str:
    for unit, size in (("GB", 1e9), ("MB", 1e6), ("kB", 1e3)):
        if value >= size:
            return f"{value / size:.1f} {unit}" if value < 100 * size else f"{value / size:.0f} {unit}"
    return f"{value:.0f} B"


def _table(names: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    lines = [names, ["---"] * len(names), *rows]
    return "\n".join(f"| {' | '.join(line)} |" for line in lines)


def _sizes(name: str, shape: Shape) -> tuple[int, int, int]:
    """Layers, rows and length of a case of the step suite."""
    layers, batch = name.split(" layers ")
    rows, length = batch.split("x")
    return shape.num_layers if layers == "all" else int(layers), int(rows), int(length)


def _benchmark_plan(shape: Shape, layers: int, rows: int, length: int) -> Plan:
    small = replace(shape, num_layers=layers)
    return Plan(small, 1, "ddp", tokens=rows * length, length=length, checkpointing=False)


def _values(measurements: Sequence[Measurement], case: str) -> dict[str, float]:
    group = latest_attempts(m for m in measurements if not m.tiny).get(("step", case), [])
    return {m.phase: m.value for m in group if m.candidate == MEASURED and m.status == OK and m.value}


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
