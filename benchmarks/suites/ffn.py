"""Rows 1 and 2: one FFN block, forward, backward and both, for every candidate."""

from __future__ import annotations

from functools import partial

import torch

from benchmarks.candidates.ffn import FfnBench, FfnCandidate
from benchmarks.context import Context
from benchmarks.graphs import time_graphs
from benchmarks.shapes import SHAPES
from graphlora.benchmark.timing import Call, Stopwatch

# Few tokens are launch-bound when called from Python; a CUDA graph shows what the kernels themselves take.
_GRAPHED_UP_TO = 1024
_LOOPS = {"eager", "loop"}
# Turns, calls of a candidate in each, and how many of these are timed, the last ones. A GPU at its limit of power slows
# down within tens of milliseconds, the more the fewer pauses a candidate leaves, and after a single call it still runs
# at the speed that the candidate before has left. The calls that are timed have as long a time of their own kind before
# them as a step of 8 layers.
_TURNS, _IN_A_ROW, _TIMED = 12, 13, 3


def measure(context: Context) -> None:
    """Times the case's candidates on one block with the same weights, routing and input."""
    p = context.case.params
    bench = FfnBench(SHAPES[p["shape"]], p["r"], p["tokens"], p["skew"], context.device, context.dtype)
    made = context.build(p["candidates"], bench.candidate)
    calls = {name: timed_call(candidate, bench) for name, candidate in made.items()}
    context.add_timings(
        context.interleave(calls, warmup=3, iterations=_TURNS, in_a_row=_IN_A_ROW, timed=_TIMED)
    )
    if context.device.type == "cuda" and p["tokens"] <= _GRAPHED_UP_TO:
        # The loops read on the host which tokens an expert has.
        runs = {
            name: partial(c.gradients, bench.x, bench.dy) for name, c in made.items() if name not in _LOOPS
        }
        time_graphs(context, runs)


def timed_call(candidate: FfnCandidate, bench: FfnBench) -> Call:
    """Forward and backward of a candidate as two phases."""

    def call(watch: Stopwatch) -> None:
        y = candidate.forward(bench.x)
        watch.lap("forward")
        torch.autograd.grad(y, (bench.x, *candidate.inputs), bench.dy)
        watch.lap("backward")

    return call
