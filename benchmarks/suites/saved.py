"""Row 6: what one FFN block keeps for backward, beside a fused plain LoRA block."""

from __future__ import annotations

from benchmarks.candidates.ffn import FfnBench
from benchmarks.context import Context
from benchmarks.shapes import SHAPES
from graphlora.benchmark.memory import measure_saved

CANDIDATES = (
    "fused_lora",
    "triton",
    "triton_recompute",
    "triton_layer",
    "torch",
    "peft_float32",
    "peft_bfloat16",
    "frozen",
    "eager",
)


def measure(context: Context) -> None:
    """Counts distinct storages that autograd holds after the forward; parameters do not count, their casts do."""
    p = context.case.params
    bench = FfnBench(SHAPES[p["shape"]], p["r"], p["tokens"], "balanced", context.device, context.dtype)
    for name, candidate in context.build(CANDIDATES, bench.candidate).items():
        with measure_saved([*bench.mlp.parameters(), *candidate.inputs]) as saved:
            y = candidate.forward(bench.x)
        context.add(name, "saved_bytes", float(saved.num_bytes), "bytes", saved=saved.shapes[:40])
        del y
