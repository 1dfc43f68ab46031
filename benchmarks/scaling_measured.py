"""What the cost model of `benchmarks.scaling` says beside what was measured on one GPU and on two. Imports no torch."""

from __future__ import annotations

import json
from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

from benchmarks.measurement import OK, Measurement, latest_attempts
from benchmarks.scaling import compute_seconds, memory, optimizer_seconds, step
from benchmarks.scaling_plan import Mode, Plan
from benchmarks.shapes import LLAMA3_8B, SHAPES, Shape
from graphlora.errors import GraphLoraError

MEASURED = "triton_r8"


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


def mfu_of_plans(measurements: Sequence[Measurement]) -> float:
    """The measured share of the peak, or the assumed one where there is none."""
    return measured_mfu(measurements) or Plan(LLAMA3_8B).mfu


def step_checks(measurements: Sequence[Measurement]) -> list[tuple[str, ...]]:
    """Rows for peak memory and for the step of all layers, the latter from the speed of a few."""
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
                rows.append(
                    _check(f"{shape.name} {name}: peak memory", value, found["peak_memory"], as_bytes)
                )
        if len(cases) == 2 and all("full" in found for found, _ in cases.values()):
            (few, few_plan), (all_layers, plan) = cases.values()
            mfu = compute_seconds(replace(few_plan, mfu=1.0)) / (few["full"] / 1e3)
            value = 1e3 * compute_seconds(replace(plan, mfu=mfu))
            what = f"{shape.name} all layers: step, from the MFU of 8 layers ({mfu:.2f})"
            rows.append(_check(what, value, all_layers["full"], lambda ms: f"{ms:.0f} ms"))
    return rows


def two_gpu_checks(values: dict[str, Any]) -> list[tuple[str, ...]]:
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
            rows.append(_check(f"two GPUs, {name}: peak memory", value, entry["peak_memory"], as_bytes))
    return rows


def _check(what: str, value: float, measured: float, shown: Callable[[float], str]) -> tuple[str, ...]:
    return what, shown(value), shown(measured), f"{value / measured:.2f}"


def as_bytes(value: float) -> str:
    """A number of bytes with its unit."""
    for unit, size in (("GB", 1e9), ("MB", 1e6), ("kB", 1e3)):
        if value >= size:
            return f"{value / size:.1f} {unit}" if value < 100 * size else f"{value / size:.0f} {unit}"
    return f"{value:.0f} B"


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
