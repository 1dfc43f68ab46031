"""Row 11: one FFN block on a CPU in float32: the grouped PyTorch path, `eager`, and the plain loop."""

from __future__ import annotations

import torch

from benchmarks.candidates.ffn import FfnBench
from benchmarks.context import Context
from benchmarks.shapes import SHAPES
from benchmarks.suites.ffn import timed_call

CANDIDATES = ("frozen", "torch", "eager", "loop", "peft_float32")


def measure(context: Context) -> None:
    """Times forward and backward, with gradients to the input, the adapters and the routing weights."""
    p = context.case.params
    bench = FfnBench(SHAPES[p["shape"]], p["r"], p["tokens"], "balanced", context.device, context.dtype)
    made = context.build(CANDIDATES, bench.candidate)
    result = context.interleave(
        {name: timed_call(candidate, bench) for name, candidate in made.items()}, warmup=2, iterations=20
    )
    threads = {name: {"threads": torch.get_num_threads()} for name in made}
    context.add_timings(result, threads)
