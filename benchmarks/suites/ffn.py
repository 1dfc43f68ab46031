"""Rows 1 and 2: one FFN block, forward, backward and both, for every candidate."""

from __future__ import annotations

import torch

from benchmarks.candidates.ffn import FfnBench, FfnCandidate
from benchmarks.context import Context
from benchmarks.failures import failures
from benchmarks.shapes import SHAPES
from graphlora.benchmark.timing import Call, Stopwatch, describe_error

# Few tokens are launch-bound when called from Python; a CUDA graph shows what the kernels themselves take.
_GRAPHED_UP_TO = 1024


def measure(context: Context) -> None:
    """Times the case's candidates on one block with the same weights, routing and input."""
    p = context.case.params
    bench = FfnBench(SHAPES[p["shape"]], p["r"], p["tokens"], p["skew"], context.device, context.dtype)
    made = context.build(p["candidates"], bench.candidate)
    calls = {name: timed_call(candidate, bench) for name, candidate in made.items()}
    context.add_timings(context.interleave(calls))
    if context.device.type == "cuda" and p["tokens"] <= _GRAPHED_UP_TO:
        _time_graphs(context, made, bench)


def timed_call(candidate: FfnCandidate, bench: FfnBench) -> Call:
    """Forward and backward of a candidate as two phases."""

    def call(watch: Stopwatch) -> None:
        y = candidate.forward(bench.x)
        watch.lap("forward")
        torch.autograd.grad(y, (bench.x, *candidate.inputs), bench.dy)
        watch.lap("backward")

    return call


def _time_graphs(context: Context, made: dict[str, FfnCandidate], bench: FfnBench) -> None:
    calls: dict[str, Call] = {}
    for name, candidate in made.items():
        try:
            calls[name] = _replayed(capture(candidate, bench))
        except failures() as error:
            context.fail(name, describe_error(error), "graph")
            torch.cuda.synchronize()
    result = context.interleave(calls)
    result.timings = {name: {"graph": phases["graph"]} for name, phases in result.timings.items()}
    context.add_timings(result)


def _replayed(graph: torch.cuda.CUDAGraph) -> Call:
    def call(watch: Stopwatch) -> None:
        graph.replay()
        watch.lap("graph")

    return call


def capture(candidate: FfnCandidate, bench: FfnBench) -> torch.cuda.CUDAGraph:
    """Forward and backward of a candidate as one CUDA graph; a failure leaves the process usable."""
    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        for _ in range(3):
            candidate.gradients(bench.x, bench.dy)
    torch.cuda.current_stream().wait_stream(stream)
    graph = torch.cuda.CUDAGraph()
    try:
        with torch.cuda.graph(graph):
            candidate.gradients(bench.x, bench.dy)
    except failures():
        # A failed capture leaves the device's random generator waiting for the rest of the capture.
        fresh = torch.Generator(bench.device)
        index = torch.cuda.current_device() if bench.device.index is None else bench.device.index
        torch.cuda.default_generators[index].graphsafe_set_state(fresh.graphsafe_get_state())
        raise
    return graph
