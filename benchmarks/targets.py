"""The rows of the target table, read from the measurements. Imports no torch."""

from __future__ import annotations

from dataclasses import dataclass

from benchmarks.registry import SUITES


@dataclass(frozen=True)
class Target:
    """One line of the target table.

    Attributes:
        row: number in the table.
        what: what is compared.
        suite: where its measurements are.
        cases: regular expression that the whole name of a case matches; the worst of them counts.
        candidate: who is measured.
        against: who it is divided by, or several of whom the fastest counts; None for a quantity itself.
        phase: which part, or which quantity.
        must: the largest value that resolves the row.
        goal: the value that was aimed at.
        unit: `"x"` for ratios.
    """

    row: str
    what: str
    suite: str
    cases: str
    candidate: str
    against: str | tuple[str, ...] | None
    phase: str
    must: float
    goal: float
    unit: str = "x"


_BIG = r"(llama3-8b|qwen2-7b)"
TARGETS: tuple[Target, ...] = (
    Target(
        "1",
        "FFN forward + backward / frozen FFN, r <= 8",
        "ffn",
        rf"{_BIG} r(2|8) T8192 .*",
        "triton",
        "frozen",
        "full",
        1.15,
        1.10,
    ),
    Target("1", "the same, r = 16", "ffn", rf"{_BIG} r16 T8192 .*", "triton", "frozen", "full", 1.18, 1.12),
    Target(
        "2",
        "FFN / PEFT LoRA of the same r, float32 adapters",
        "ffn",
        rf"{_BIG} r\d+ T8192 .*",
        "triton",
        "peft_float32",
        "full",
        0.75,
        0.68,
    ),
    Target(
        "3",
        "step / PEFT LoRA, bf16 adapters, same targets, r = 16",
        "step",
        rf"{_BIG} 8 layers .*",
        "triton_r16",
        "peft_bfloat16_r16",
        "full",
        1.00,
        0.90,
    ),
    Target(
        "4",
        "step / PEFT LoRA, float32 adapters (its default) with dropout 0.05",
        "step",
        rf"{_BIG} 8 layers .*",
        "triton_r16",
        "peft_float32_dropout_r16",
        "full",
        0.75,
        0.65,
    ),
    Target(
        "4",
        "the same, dropout 0.05 on both",
        "step",
        rf"{_BIG} 8 layers .*",
        "triton_dropout_r16",
        "peft_float32_dropout_r16",
        "full",
        0.75,
        0.65,
    ),
    Target(
        "5",
        "step, launched / the expert loop (the faster of eager and the plain loop)",
        "step",
        r"llama3-8b 8 layers .*",
        "triton_r8",
        ("eager_r8", "loop_r8"),
        "full",
        1 / 3,
        1 / 4,
    ),
    Target(
        "5",
        "step, compiled as in long runs / the expert loop",
        "step",
        r"llama3-8b modes.*",
        "triton_r8_compiled",
        ("eager_r8", "loop_r8"),
        "full",
        1 / 3,
        1 / 4,
    ),
    Target(
        "5",
        "step, launched / the released code's way",
        "step",
        r"llama3-8b 8 layers .*",
        "triton_r8",
        "released_r8",
        "full",
        1 / 3,
        1 / 4,
    ),
    Target(
        "5",
        "step, launched / MoE-PEFT's MixLoRA, published code",
        "step",
        r"llama3-8b 8 layers .*",
        "triton_dropout_r8",
        "moe_peft_mixlora_r8",
        "full",
        1 / 3,
        1 / 4,
    ),
    Target(
        "5",
        "eager / the plain loop it must not trail",
        "step",
        r"llama3-8b 8 layers .*",
        "eager_r8",
        "loop_r8",
        "full",
        1.10,
        1.00,
    ),
    Target(
        "6",
        "saved activation bytes / fused plain LoRA",
        "saved",
        rf"{_BIG} .*",
        "triton",
        "fused_lora",
        "saved_bytes",
        1.10,
        1.05,
    ),
    Target(
        "7",
        "router forward + backward, T = 8192, CUDA graph",
        "router",
        # What the presets have: the default's width, and the paper's without a self term.
        r"llama3-8b (width64 T8192|width256 T8192 self_term none)",
        "triton",
        None,
        "graph",
        0.5,
        0.26,
        "ms",
    ),
    Target(
        "7",
        "the same at width 256 with a self term, which no preset has",
        "router",
        r"llama3-8b width256 T8192",
        "triton",
        None,
        "graph",
        0.5,
        0.26,
        "ms",
    ),
    Target(
        "8",
        "kernel launches per FFN block forward + backward",
        "launches",
        rf"{_BIG} .*",
        "triton",
        None,
        "kernels",
        30,
        18,
        "launches",
    ),
    Target("8", "host syncs in it", "launches", rf"{_BIG} .*", "triton", None, "syncs", 0, 0, "syncs"),
    Target(
        "8",
        "not capturable as a CUDA graph",
        "launches",
        rf"{_BIG} .*",
        "triton",
        None,
        "not_capturable",
        0,
        0,
        "blocks",
    ),
    Target(
        "9", "repeats whose bits differ", "exact", rf"{_BIG} .*", "triton", None, "differing", 0, 0, "tensors"
    ),
    Target(
        "9",
        "error against float64 / bf16 plain LoRA's",
        "exact",
        rf"{_BIG} .*",
        "triton",
        "peft_bfloat16",
        "error",
        1.00,
        1.00,
    ),
    Target(
        "10",
        "decode step, up to 64 tokens / frozen model",
        "decode",
        r"llama3-8b .*",
        "triton",
        "frozen",
        "full",
        1.15,
        1.08,
    ),
    Target(
        "11",
        "CPU: FFN, fused PyTorch path / expert loop (eager)",
        "cpu",
        r".* T\d+",
        "torch",
        "eager",
        "full",
        0.80,
        0.70,
    ),
    Target(
        "11",
        "the same in bfloat16, on a CPU that computes it",
        "cpu",
        r".* bfloat16",
        "torch",
        "eager",
        "full",
        0.80,
        0.70,
    ),
    Target(
        "11",
        "CPU: eager / the plain loop it must not trail",
        "cpu",
        r".*",
        "eager",
        "loop",
        "full",
        1.10,
        1.00,
    ),
    Target(
        "12",
        "SmolLM2-135M step, 16 x 128 / PEFT LoRA",
        "small",
        r"smollm2-135m .* graphs",
        "triton_graph",
        "peft",
        "full",
        0.33,
        0.15,
    ),
    Target(
        "12",
        "the same, recorded from compiled layers, as in long runs",
        "small",
        r"smollm2-135m .* compiled",
        "triton_compiledgraph",
        "peft",
        "full",
        0.33,
        0.15,
    ),
)


def suites_of_rows(rows: list[str] | None) -> list[str]:
    """Suites that the rows are read from, in the registry's order; None means all.

    Args:
        rows: numbers of the table, `"full"` (all layers; same suite as 3) or names of suites.

    Raises:
        KeyError: an unknown row.
    """
    if rows is None:
        return list(SUITES)
    by_row = (
        {target.row: target.suite for target in TARGETS} | {"full": "step"} | {name: name for name in SUITES}
    )
    wanted = {by_row[row] for row in rows}
    return [name for name in SUITES if name in wanted]
