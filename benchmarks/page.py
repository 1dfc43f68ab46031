"""From data to `docs/performance.md`: the pictures, and the tables between the page's markers. Imports no torch."""

from __future__ import annotations

import re
from collections.abc import Callable, Sequence
from pathlib import Path

from benchmarks.measurement import OK, Measurement, latest_attempts
from benchmarks.table import (
    candidates_table,
    matrix_table,
    number,
    others_table,
    step_table,
    target_table,
    verdicts,
)
from benchmarks.targets import TARGETS
from graphlora.errors import GraphLoraError
from graphlora.records import write_text
from graphlora.report.figures import save_figure
from graphlora.report.performance import (
    TargetPoint,
    ffn_matrix_figure,
    step_time_figure,
    target_figure,
    throughput_figure,
)

LABELS = {
    "frozen": "frozen model",
    "peft_bfloat16_r16": "PEFT LoRA, bf16",
    "peft_float32_r16": "PEFT LoRA, float32",
    "peft_float32_dropout_r16": "PEFT LoRA, float32, dropout",
    "peft_sized": "PEFT LoRA, same size",
    "triton_r16": "GraphLoRA r=16",
    "triton_r8": "GraphLoRA r=8",
    "triton_dropout_r16": "GraphLoRA r=16, dropout",
    "triton_dropout_r8": "GraphLoRA r=8, dropout",
    "torch_r8": "GraphLoRA r=8, torch",
    "eager_r8": "expert loop (eager)",
    "loop_r8": "expert loop (plain)",
    "released_r8": "expert loop (as released)",
    "moe_peft_mixlora_r8": "MixLoRA r=8 (MoE-PEFT)",
}
# How a step is run, by the ending of a candidate's name; the MODES of candidates/modes.py.
MODE_LABELS = {
    "graph": "recorded",
    "compiled": "compiled",
    "compiledgraph": "compiled and recorded",
    "whole": "compiled whole",
    "liger": "Liger's loss",
    "ligers": "Liger's kernels",
}
# Options of a command that name a folder of one machine, or the commit, which stands above.
_PLACES = re.compile(r" --(out|commit|resume)( (?!-)\S+)?")
# Tokens of row 1.
BOUNDS_AT = 8192
TABLES: dict[str, Callable[[Sequence[Measurement]], str]] = {
    "targets": target_table,
    "throughput": lambda _: "",
    "steps": step_table,
    "matrix": matrix_table,
    "candidates": candidates_table,
    "others": others_table,
}

PICTURES = {
    "targets": ("targets.png", "Measured value of every target relative to what it must reach"),
    "throughput": ("throughput.png", "Tokens per second of whole models, launched and compiled"),
    "steps": ("step_time.png", "Step time of every candidate relative to the frozen model"),
    "matrix": (
        "ffn_matrix.png",
        "Time of the adapted FFN relative to the frozen one over tokens, rank and skew",
    ),
}


def draw_figures(measurements: Sequence[Measurement], folder: Path) -> list[Path]:
    """Draws the pictures for which there are data; returns their files."""
    drawn = []
    steps = _step_ratios(measurements)
    if steps:
        drawn.append(save_figure(step_time_figure(steps), folder / "step_time.png"))
    rates = _rates(measurements)
    if rates:
        drawn.append(save_figure(throughput_figure(rates), folder / "throughput.png"))
    ratios = _ffn_ratios(measurements)
    if ratios:
        must, goal = _bounds()
        drawn.append(save_figure(ffn_matrix_figure(ratios, must, goal, BOUNDS_AT), folder / "ffn_matrix.png"))
    points = [
        TargetPoint(
            f"{v.target.row}. {v.target.what}", v.worst, v.target.must, v.target.goal,
            f"{number(v.worst, v.target.unit)} (must {number(v.target.must, v.target.unit)})",
        )
        for v in verdicts(measurements)
    ]  # fmt: skip
    drawn.append(save_figure(target_figure(points), folder / "targets.png"))
    return drawn


def update_page(measurements: Sequence[Measurement], page: Path) -> str:
    """Puts the tables between the page's markers `<!-- begin NAME -->` and `<!-- end NAME -->`.

    Returns:
        A line that says what was written.

    Raises:
        GraphLoraError: a page without one of the markers.
    """
    text = page.read_text(encoding="utf-8")
    for name, make in TABLES.items():
        parts = [_picture(name, page.parent), make(measurements)]
        content = "\n\n".join(part for part in parts if part) or "Not measured yet."
        block = f"<!-- begin {name} -->\n{content}\n<!-- end {name} -->"
        pattern = rf"<!-- begin {name} -->.*?<!-- end {name} -->"
        text, count = re.subn(pattern, lambda _, block=block: block, text, flags=re.DOTALL)
        if count != 1:
            raise GraphLoraError(f"{page} has {count} blocks `<!-- begin {name} -->`; it must have one")
    sources = f"<!-- begin source -->\n{_sources(measurements)}\n<!-- end source -->"
    text = re.sub(r"<!-- begin source -->.*?<!-- end source -->", lambda _: sources, text, flags=re.DOTALL)
    write_text(page, text)
    return f"{page}: {len(measurements)} measurements"


def _picture(name: str, folder: Path) -> str:
    """The block's picture in Markdown, where there are data for one."""
    file, alternative = PICTURES.get(name, ("", ""))
    return f"![{alternative}](images/{file})" if file and (folder / "images" / file).is_file() else ""


def _sources(measurements: Sequence[Measurement]) -> str:
    """Commits, devices, versions and commands that the numbers come from, and what each commit measured."""
    used = [
        m for group in latest_attempts(measurements).values() for m in group if m.provenance.get("commit")
    ]
    origins: dict[tuple[str, str, str], list[Measurement]] = {}
    for m in used:
        p = m.provenance
        installed = p.get("versions", {})
        names = [name for name in ("torch", "triton", "transformers", "peft") if name in installed]
        versions = ", ".join(f"{name} {installed[name]}" for name in names)
        origins.setdefault((str(p["commit"])[:7], str(p.get("device")), versions), []).append(m)
    lines = []
    for (commit, device, versions), group in sorted(origins.items(), key=lambda item: item[1][0].created):
        suites = ", ".join(dict.fromkeys(m.suite for m in group))
        lines.append(f"- {commit}, {device}, {versions}: {suites}")
        commands = dict.fromkeys(str(m.provenance.get("command")) for m in group)
        lines += [f"  - `{_PLACES.sub('', command)}`" for command in commands]
    return "\n".join(lines)


def _step_ratios(measurements: Sequence[Measurement]) -> dict[str, dict[str, float]]:
    """Step time relative to the frozen model, by the cases with few layers, which have all candidates."""
    result = {}
    for (suite, case), group in sorted(latest_attempts(measurements).items()):
        values = {m.candidate: m.value for m in group if m.status == OK and m.phase == "full" and m.value}
        if suite != "step" or "frozen" not in values or "eager_r8" not in values:
            continue
        labels = {name: label for name in values if (label := _label(name)) is not None}
        order = sorted(labels, key=lambda name: list(LABELS).index(_without_mode(name)))
        result[case] = {labels[name]: values[name] / values["frozen"] for name in order}
    return result


def _rates(measurements: Sequence[Measurement]) -> dict[str, dict[str, tuple[float, float]]]:
    """Tokens per second launched and compiled, of the models with all their layers."""
    result: dict[str, dict[str, tuple[float, float]]] = {}
    for (suite, case), group in sorted(latest_attempts(measurements).items()):
        if suite != "step" or "all layers" not in case:
            continue
        values = {m.candidate: m.value for m in group if m.phase == "tokens_per_second" and m.value}
        pairs = {
            LABELS[name]: (values[name], compiled)
            for name in LABELS
            if name in values and (compiled := values.get(f"{name}_compiled"))
        }
        if pairs:
            result[case] = pairs
    return result


def _label(candidate: str) -> str | None:
    """A candidate as pictures name it."""
    source = _without_mode(candidate)
    if source not in LABELS:
        return None
    mode = candidate.removeprefix(source).removeprefix("_")
    return LABELS[source] + (f", {MODE_LABELS[mode]}" if mode else "")


def _without_mode(candidate: str) -> str:
    source, _, mode = candidate.rpartition("_")
    return source if mode in MODE_LABELS else candidate


def _ffn_ratios(measurements: Sequence[Measurement]) -> dict[tuple[str, int, int, str], float]:
    result = {}
    for (suite, _), group in latest_attempts(measurements).items():
        phase = "graph" if any(m.phase == "graph" and m.candidate == "triton" for m in group) else "full"
        values = {m.candidate: m.value for m in group if m.status == OK and m.phase == phase and m.value}
        if suite == "ffn" and {"frozen", "triton"} <= set(values):
            p = group[0].params
            result[p["shape"], p["r"], p["tokens"], p["skew"]] = values["triton"] / values["frozen"]
    return result


def _bounds() -> tuple[dict[int, float], dict[int, float]]:
    """Must and goal of row 1 by rank."""
    small, large = (t for t in TARGETS if t.row == "1")
    return (
        {2: small.must, 8: small.must, 16: large.must},
        {2: small.goal, 8: small.goal, 16: large.goal},
    )
