"""What is measured: suites of cases. Imports no torch."""

from __future__ import annotations

from benchmarks.cases import (
    FFN_TINY,
    FULL,
    JOINED,
    MODES,
    RUNS,
    SMALL,
    STEP,
    STEP_TINY,
    Case,
    Suite,
    attention_case,
    cpu_cases,
    cpu_step_case,
    ffn_cases,
    generate_case,
    packing_case,
    runs_case,
    shaped,
)
from benchmarks.shapes import EIGHT_BILLION, LLAMA3_8B, LLAMA3_70B, SMOLLM2, TINY

SUITES: dict[str, Suite] = {
    suite.name: suite
    for suite in (
        Suite(
            "ceilings",
            (Case("ceilings", "gemm and copy", {"size": 8192}, 5),),
            (Case("ceilings", "gemm and copy", {"size": 64}),),
        ),
        Suite("ffn", ffn_cases(), (FFN_TINY,)),
        Suite(
            "joined",
            tuple(
                Case(
                    "joined",
                    f"{shape.name} r{r} T8192",
                    {"shape": shape.name, "r": r, "tokens": 8192, "skew": "balanced", "candidates": JOINED},
                    6,
                )
                for r in (8, 16)
                for shape in EIGHT_BILLION
            ),
            (
                Case(
                    "joined",
                    "tiny r2 T24",
                    {"shape": "tiny", "r": 2, "tokens": 24, "skew": "skewed", "candidates": JOINED},
                ),
            ),
        ),
        Suite(
            "attention",
            tuple(
                attention_case(shape, r, tokens, 15)
                for r, tokens in ((16, 4096), (8, 4096), (16, 8192))
                for shape in EIGHT_BILLION
            ),
            (attention_case(TINY, 2, 24, 20),),
        ),
        Suite(
            "products",
            (
                *shaped("products", EIGHT_BILLION, 8, r=8, tokens=8192),
                *shaped("products", EIGHT_BILLION, 8, r=16, tokens=8192),
            ),
            shaped("products", (TINY,), 1, r=2, tokens=24),
        ),
        Suite("step", (*STEP, *FULL, MODES), (STEP_TINY,)),
        Suite(
            "saved",
            shaped("saved", EIGHT_BILLION, 10, r=8, tokens=8192),
            shaped("saved", (TINY,), 1, r=2, tokens=24),
        ),
        Suite(
            "router",
            (
                *shaped("router", (LLAMA3_8B,), 15, width=64, tokens=8192),
                *shaped("router", (LLAMA3_8B,), 15, width=256, tokens=8192, self_term="none"),
                *shaped("router", (LLAMA3_8B,), 15, width=256, tokens=8192),
            ),
            shaped("router", (TINY,), 1, width=8, tokens=24),
        ),
        Suite(
            "launches",
            shaped("launches", EIGHT_BILLION, 15, r=8, tokens=8192),
            shaped("launches", (TINY,), 1, r=2, tokens=24),
            "cuda",
        ),
        Suite(
            "host",
            tuple(
                Case(
                    "host",
                    f"{shape.name} 8 layers 8x512",
                    {
                        "shape": shape.name,
                        "layers": 8,
                        "batch": 8,
                        "length": 512,
                        "candidates": [
                            "frozen",
                            "peft_bfloat16_r16",
                            "peft_float32_dropout_r16",
                            "triton_r16",
                            "triton_dropout_r16",
                            "eager_r8",
                        ],
                    },
                    40,
                )
                for shape in EIGHT_BILLION
            ),
            (
                Case(
                    "host",
                    "tiny 2 layers 2x16",
                    {
                        "shape": "tiny",
                        "layers": 2,
                        "batch": 2,
                        "length": 16,
                        "candidates": ["frozen", "triton_r16"],
                    },
                ),
            ),
        ),
        Suite(
            "exact",
            shaped("exact", EIGHT_BILLION, 25, r=8, tokens=1024),
            shaped("exact", (TINY,), 1, r=2, tokens=24),
        ),
        Suite(
            "decode",
            tuple(
                Case(
                    "decode",
                    f"llama3-8b batch{batch}",
                    {"shape": "llama3-8b", "layers": 32, "batch": batch, "context": 512},
                    18,
                )
                for batch in (64, 1, 8, 32)
            ),
            (Case("decode", "tiny batch2", {"shape": "tiny", "layers": 2, "batch": 2, "context": 16}),),
            "cuda",
        ),
        Suite(
            "generate",
            tuple(generate_case(LLAMA3_8B, 8, batch, 128, 64, 100) for batch in (1, 8)),
            (generate_case(TINY, 2, 2, 6, 4, 1),),
        ),
        Suite(
            "runs",
            RUNS,
            (
                runs_case(
                    TINY,
                    2,
                    2,
                    (5, 12),
                    True,
                    1,
                    ["peft_eager", "triton_eager", "triton_compile", "triton_graph"],
                ),
            ),
        ),
        Suite(
            "packing",
            tuple(
                packing_case("packing", LLAMA3_8B, 8, rows, "triton_r8", "bfloat16", 60)
                for rows in (16, 64, 256)
            ),
            (packing_case("packing", TINY, 2, 4, "triton_r8", "float32", 1),),
        ),
        Suite(
            "cpu_packing",
            tuple(
                packing_case("cpu_packing", SMOLLM2, SMOLLM2.num_layers, rows, "torch_r8", "bfloat16", 250)
                for rows in (8, 32)
            ),
            (packing_case("cpu_packing", TINY, 2, 4, "torch_r8", "float32", 1),),
            "cpu",
        ),
        Suite("small", SMALL, shaped("small", (TINY,), 1, batch=2, length=16)),
        Suite(
            "large",
            shaped("large", (LLAMA3_70B,), 150, batch=1, length=2048, r=8),
            shaped("large", (TINY,), 1, batch=1, length=16, r=2),
        ),
        Suite(
            "curves",
            (
                Case("curves", "float32", {"dtype": "float32", "steps": 100}, 30),
                Case("curves", "bfloat16", {"dtype": "bfloat16", "steps": 100}, 30),
            ),
            (Case("curves", "float32", {"dtype": "float32", "steps": 4}),),
        ),
        Suite("cpu", cpu_cases((1024, 256, 2048)), shaped("cpu", (TINY,), 1, r=2, tokens=24), "cpu"),
        Suite(
            "cpu_step",
            tuple(cpu_step_case(SMOLLM2, 8, 64, dtype, 120) for dtype in ("float32", "bfloat16")),
            (cpu_step_case(TINY, 2, 16, "float32", 1),),
            "cpu",
        ),
    )
}
