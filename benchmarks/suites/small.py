"""Row 12: a training step of a small model, where launches decide: eager, recorded as a CUDA graph, compiled."""

from __future__ import annotations

from benchmarks.candidates.models import model_config, random_tokens
from benchmarks.candidates.modes import call_in_mode, candidate_in_mode
from benchmarks.context import Context
from benchmarks.shapes import SHAPES
from graphlora.benchmark.random_model import random_model
from graphlora.benchmark.timing import Call

# The name in the table, and the step with how it is run.
CANDIDATES = {
    "frozen": "frozen",
    "peft": "peft_float32_r8",
    "peft_bfloat16": "peft_bfloat16_r8",
    "peft_graph": "peft_float32_r8_graph",
    "triton": "triton_r8",
    "triton_graph": "triton_r8_graph",
    "torch_graph": "torch_r8_graph",
    "eager": "eager_r8",
    "peft_bfloat16_compiledgraph": "peft_bfloat16_r8_compiledgraph",
    "triton_compiled": "triton_r8_compiled",
    "triton_compiledgraph": "triton_r8_compiledgraph",
}


def measure(context: Context) -> None:
    """Times whole steps; the optimizer is AdamW outside of the graph for all."""
    p = context.case.params
    shape = SHAPES[p["shape"]]
    base = random_model(model_config(shape, shape.num_layers), context.device, context.dtype)
    ids = random_tokens(shape, p["batch"], p["length"], context.device)
    names = p.get("candidates", CANDIDATES)

    def make(name: str) -> Call:
        # On a CPU the kernels' names have become the PyTorch path's.
        step = context.stand_in(CANDIDATES[name if name in CANDIDATES else name.replace("torch", "triton")])
        return call_in_mode(step, candidate_in_mode(step, base, context.device), ids, context.device)

    context.add_timings(context.interleave(context.build(names, make), warmup=5, iterations=30))
