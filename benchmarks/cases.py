"""Cases that are measured: their shapes, candidates and about how long they take. Imports no torch."""

from __future__ import annotations

from dataclasses import dataclass, field, replace
from typing import Any

from benchmarks.shapes import (
    EIGHT_BILLION,
    LLAMA3_8B,
    MEDIUM,
    SMOLLM2,
    SMOLLM2_1B7,
    SMOLLM2_360M,
    TINY,
    Shape,
)


@dataclass(frozen=True)
class Case:
    """One unit of work of the runner: its candidates are interleaved in one process.

    Attributes:
        suite: name of its suite.
        name: unique within the suite.
        params: what the suite's `measure` gets; `dtype`, if there, is the frozen weights'.
        seconds: about how long it takes on an H200, kernels' compilation included.
    """

    suite: str
    name: str
    params: dict[str, Any] = field(default_factory=dict)
    seconds: float = 20.0


@dataclass(frozen=True)
class Suite:
    """Cases that one module measures.

    Attributes:
        name: as in `Case.suite`; the module is `benchmarks.suites.<name>`.
        cases: in the order of their importance.
        tiny: the same with sizes for a CPU, in seconds.
        device: `"cuda"` where tiny cases need a GPU too, `"cpu"` where the suite is about the CPU, else `"any"`.
    """

    name: str
    cases: tuple[Case, ...]
    tiny: tuple[Case, ...]
    device: str = "any"


def _ffn_case(shape: Shape, r: int, tokens: int, skew: str, more: bool, seconds: float) -> Case:
    name = f"{shape.name} r{r} T{tokens} {skew}"
    candidates = ["frozen", "peft_float32", "peft_bfloat16", "triton"]
    if more:
        candidates += [
            "peft_float32_dropout",
            "peft_bfloat16_dropout",
            "triton_dropout",
            "triton_recompute",
            "triton_layer",
            "torch",
            "torch_compiled",
            "eager",
            "loop",
            "expanded",
        ]
    params = {"shape": shape.name, "r": r, "tokens": tokens, "skew": skew, "candidates": candidates}
    return Case("ffn", name, params, seconds)


def ffn_cases() -> tuple[Case, ...]:
    """One block: all candidates where row 1 is judged, the ones of rows 1 and 2 in the rest of the matrix."""
    first = [
        _ffn_case(shape, 8, 8192, skew, True, 60)
        for skew in ("balanced", "skewed")
        for shape in EIGHT_BILLION
    ]
    rest = [
        _ffn_case(shape, r, tokens, skew, False, 6)
        for tokens in (8192, 1024, 16384)
        for r in (8, 16, 2)
        for skew in ("balanced", "skewed")
        for shape in EIGHT_BILLION
        if (r, tokens) != (8, 8192)
    ]
    return (*first, *rest)


_ATTENTION = [
    *("frozen", "peft_float32", "peft_bfloat16", "apart", "together"),
    *("frozen_compiled", "peft_bfloat16_compiled", "apart_compiled", "together_compiled"),
]


def attention_case(shape: Shape, r: int, tokens: int, seconds: float) -> Case:
    """The four projections of an attention module."""
    params = {"shape": shape.name, "r": r, "tokens": tokens, "candidates": _ATTENTION}
    return Case("attention", f"{shape.name} r{r} T{tokens}", params, seconds)


JOINED = ["frozen", "triton", "triton_joined"]
_STEP_CANDIDATES = (
    "frozen",
    "peft_bfloat16_r16",
    "peft_float32_r16",
    "peft_float32_dropout_r16",
    "peft_sized",
    "triton_r16",
    "triton_r8",
    "triton_dropout_r16",
    "triton_dropout_r8",
    "torch_r8",
    "eager_r8",
    "loop_r8",
    "released_r8",
    "moe_peft_mixlora_r8",
)


def _step_case(shape: Shape, seconds: float) -> Case:
    params = {
        "shape": shape.name,
        "layers": 8,
        "batch": 8,
        "length": 512,
        "in_a_row": 2,
        "iterations": 14,
        "seconds": 130,
        "candidates": list(_STEP_CANDIDATES),
    }
    return Case("step", f"{shape.name} 8 layers 8x512", params, seconds)


def _full_case(shape: Shape) -> Case:
    launched = ["frozen", "peft_bfloat16_r16", "peft_float32_dropout_r16", "triton_r16", "triton_dropout_r16"]
    params = {
        "shape": shape.name,
        "layers": shape.num_layers,
        "batch": 8,
        "length": 1024,
        "in_a_row": 2,
        "iterations": 10,
        # What is compiled takes half of it.
        "seconds": 150,
        "candidates": [*launched, *(f"{name}_compiled" for name in launched)],
    }
    return Case("step", f"{shape.name} all layers 8x1024", params, 190)


FULL = tuple(_full_case(shape) for shape in EIGHT_BILLION)
STEP = tuple(_step_case(shape, 150) for shape in EIGHT_BILLION)
FFN_TINY = _ffn_case(TINY, 2, 24, "skewed", True, 1)
# The same step run in other ways, and Liger's kernels beside it; the loops are there for row 5.
MODES = Case(
    "step",
    "llama3-8b modes, 8 of its layers, 8x512",
    {
        "shape": LLAMA3_8B.name,
        "layers": 8,
        "batch": 8,
        "length": 512,
        "in_a_row": 2,
        # What is compiled takes half of it.
        "seconds": 160,
        "candidates": [
            "frozen",
            "frozen_compiled",
            "peft_bfloat16_r16",
            "peft_bfloat16_r16_compiled",
            "peft_bfloat16_r16_ligers",
            "peft_float32_dropout_r16",
            "peft_float32_dropout_r16_compiled",
            "triton_r16",
            "triton_r16_graph",
            "triton_r16_compiled",
            "triton_r16_whole",
            "triton_r16_liger",
            "triton_r16_ligers",
            "triton_dropout_r16",
            "triton_dropout_r16_compiled",
            "triton_r8",
            "triton_r8_compiled",
            "eager_r8",
            "loop_r8",
        ],
    },
    200,
)
STEP_TINY = Case(
    "step",
    "tiny 2 layers 2x16",
    {
        "shape": "tiny",
        "layers": 2,
        "batch": 2,
        "length": 16,
        "in_a_row": 2,
        "candidates": [
            *_STEP_CANDIDATES,
            "triton_r8_graph",
            "triton_r8_compiled",
            "triton_r8_compiledgraph",
            "triton_r8_whole",
            "triton_r8_liger",
        ],
    },
)


def shaped(suite: str, shapes: tuple[Shape, ...], seconds: float, **params: Any) -> tuple[Case, ...]:
    """One case per shape of a suite; their names say the parameters."""
    label = " ".join(
        f"{'T' if key == 'tokens' else key}{' ' if isinstance(value, str) else ''}{value}"
        for key, value in params.items()
    )
    return tuple(
        Case(suite, f"{shape.name} {label}", {"shape": shape.name, **params}, seconds) for shape in shapes
    )


_CPU_STEP = ("frozen", "peft_float32_r8", "torch_r8", "eager_r8", "loop_r8")


def cpu_cases(tokens: tuple[int, ...]) -> tuple[Case, ...]:
    """One block on a CPU, in both dtypes."""
    cases = [case for t in tokens for case in shaped("cpu", (SMOLLM2, MEDIUM), 30, r=8, tokens=t)]
    half = [replace(c, name=f"{c.name} bfloat16", params=c.params | {"dtype": "bfloat16"}) for c in cases]
    return (*cases, *half)


def cpu_step_case(shape: Shape, batch: int, length: int, dtype: str, seconds: float) -> Case:
    """A whole step on a CPU."""
    params = {"shape": shape.name, "batch": batch, "length": length, "dtype": dtype}
    name = f"{shape.name} {batch}x{length} {dtype}"
    return Case("cpu_step", name, {**params, "candidates": list(_CPU_STEP)}, seconds)


def _small_case(
    shape: Shape, batch: int, length: int, mode: str, seconds: float, candidates: list[str]
) -> Case:
    params = {"shape": shape.name, "batch": batch, "length": length, "candidates": candidates}
    return Case("small", f"{shape.name} {batch}x{length} {mode}", params, seconds)


_CROSSOVER = ["triton", "triton_graph"]
SMALL = (
    _small_case(
        SMOLLM2,
        16,
        128,
        "graphs",
        50,
        ["frozen", "peft", "peft_bfloat16", "peft_graph", "triton", "triton_graph", "torch_graph", "eager"],
    ),
    _small_case(
        SMOLLM2,
        16,
        128,
        "compiled",
        90,
        [
            "peft",
            "peft_bfloat16",
            "peft_bfloat16_compiledgraph",
            "triton_graph",
            "triton_compiled",
            "triton_compiledgraph",
        ],
    ),
    # Where a recorded step stops being faster than its launches, for `graphlora.training.step_mode`.
    *(
        _small_case(shape, batch, 512, "crossover", 20, _CROSSOVER)
        for shape, batches in ((SMOLLM2, (16,)), (SMOLLM2_360M, (8,)), (SMOLLM2_1B7, (4, 8, 16)))
        for batch in batches
    ),
    *(
        _small_case(
            SMOLLM2_1B7, batch, 512, "compiled", 45, [*_CROSSOVER, "triton_compiled", "triton_compiledgraph"]
        )
        for batch in (8, 16)
    ),
)


def generate_case(shape: Shape, layers: int, batch: int, prompt: int, new: int, seconds: float) -> Case:
    """Tokens made with `generate`."""
    params = {"shape": shape.name, "layers": layers, "batch": batch, "prompt": prompt, "new": new}
    return Case("generate", f"{shape.name} {layers} layers batch{batch}", params, seconds)


def runs_case(
    shape: Shape,
    layers: int,
    batch: int,
    lengths: tuple[int, int],
    packing: bool,
    seconds: float,
    names: list[str],
) -> Case:
    """Whole runs of `graphlora train`."""
    shortest, longest = lengths
    params = {
        "shape": shape.name, "layers": layers, "batch": batch, "shortest": shortest, "longest": longest,
        "packing": packing, "r": 8, "candidates": names,
    }  # fmt: skip
    how = "packed" if packing else "padded"
    return Case("runs", f"{shape.name} {layers} layers {batch} rows {how}", params, seconds)


_LAUNCHED_OR_COMPILED = ["peft_eager", "peft_compile", "triton_eager", "triton_compile"]
RUNS = (
    runs_case(LLAMA3_8B, 8, 64, (20, 100), True, 190, _LAUNCHED_OR_COMPILED),
    runs_case(LLAMA3_8B, 8, 16, (200, 300), False, 190, _LAUNCHED_OR_COMPILED),
    runs_case(
        SMOLLM2,
        SMOLLM2.num_layers,
        16,
        (40, 120),
        False,
        180,
        ["peft_eager", "peft_compiledgraph", "triton_eager", "triton_graph", "triton_compiledgraph"],
    ),
)


def packing_case(
    suite: str, shape: Shape, layers: int, rows: int, model: str, dtype: str, seconds: float
) -> Case:
    """Rows padded, joined in one sequence, and in blocks."""
    params = {
        "shape": shape.name, "layers": layers, "rows": rows, "shortest": 20, "longest": 100, "model": model,
        "dtype": dtype, "seconds": 0.6 * seconds,
    }  # fmt: skip
    return Case(suite, f"{shape.name} {layers} layers {rows} rows", params, seconds)
