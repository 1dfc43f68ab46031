"""From the cost model to `docs/scaling.md`: tables between the page's markers. Imports no torch."""

from __future__ import annotations

import re
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from benchmarks.measurement import Measurement
from benchmarks.scaling import (
    collectives,
    first_limit,
    hidden_from,
    memory,
    step,
    waiting_share,
    with_global_batch,
)
from benchmarks.scaling_measured import as_bytes, measured_mfu, mfu_of_plans, step_checks, two_gpu_checks
from benchmarks.scaling_plan import ETHERNET, FLOAT32, SLOW, Adapter, Cluster, Mode, Plan
from benchmarks.shapes import LLAMA3_8B, LLAMA3_70B, LLAMA3_405B, Shape
from graphlora.errors import GraphLoraError
from graphlora.records import write_text

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
             as_bytes(FLOAT32 * trained), as_bytes(3 * FLOAT32 * trained), f"{adapter.load_bytes(shape):,} B",
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
                (label, item.what, item.kind.replace("_", "-"), f"{item.count}", as_bytes(item.num_bytes),
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
                (shape.name, label, as_bytes(parts["base"] + parts["gathered"]), as_bytes(state),
                 as_bytes(parts["activations"] + parts["logits"]), _fits(total), _fits(at_64))
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
            plans = [
                Plan(shape, gpus, mode, bits, mfu=mfu_of_plans(measurements), cluster=cluster)
                for gpus in GPUS
            ]
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
                plan = Plan(shape, gpus, mode, bits, mfu=mfu_of_plans(measurements), cluster=cluster)
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
    mfu = mfu_of_plans(measurements)
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
    rows = [*step_checks(measurements), *two_gpu_checks(two_gpus)]
    if not rows:
        return "No step has been measured on a GPU yet, so nothing here is checked against one."
    return _table(("what", "model", "measured", "model / measured"), rows)


def _assumption_table(measurements: Sequence[Measurement], two_gpus: dict[str, Any]) -> str:
    del two_gpus
    found = measured_mfu(measurements)
    source = (
        "assumed; no step was measured on a GPU yet"
        if found is None
        else "measured, one GPU, Llama3-8B's shape"
    )
    return f"Share of the peak that a GPU's step reaches: **{mfu_of_plans(measurements):.2f}** ({source})."


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
    text = as_bytes(num_bytes)
    return text if num_bytes <= Cluster().memory else f"**{text}**"


def _table(names: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    lines = [names, ["---"] * len(names), *rows]
    return "\n".join(f"| {' | '.join(line)} |" for line in lines)
