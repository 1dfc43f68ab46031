"""Row 11: one FFN block on a CPU, in float32 and bfloat16: the grouped PyTorch path, `eager`, and the plain loop."""

from __future__ import annotations

import torch

from benchmarks.candidates.ffn import FfnBench
from benchmarks.context import Context
from benchmarks.failures import NotHere
from benchmarks.shapes import SHAPES
from benchmarks.suites.ffn import timed_call
from graphlora.training.loading import pick_dtype

CANDIDATES = ("frozen", "torch", "eager", "loop", "peft_float32")


def measure(context: Context) -> None:
    """Times forward and backward, with gradients to the input, the adapters and the routing weights."""
    ask_for_hardware(context.dtype)
    p = context.case.params
    bench = FfnBench(SHAPES[p["shape"]], p["r"], p["tokens"], "balanced", context.device, context.dtype)
    made = context.build(CANDIDATES, bench.candidate)
    result = context.interleave(
        {name: timed_call(candidate, bench) for name, candidate in made.items()}, warmup=2, iterations=20
    )
    threads = {name: {"threads": torch.get_num_threads()} for name in made}
    context.add_timings(result, threads)


def ask_for_hardware(dtype: torch.dtype) -> None:
    """Stops where this CPU has no instructions for bfloat16.

    Raises:
        NotHere: It has none.
    """
    if dtype == torch.bfloat16 and pick_dtype("auto", torch.device("cpu")) != dtype:
        raise NotHere("this CPU computes bfloat16 in float32: it has neither avx512_bf16 nor amx_bf16")
