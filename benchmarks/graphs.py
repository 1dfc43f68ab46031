"""CUDA graphs of what is measured: what the kernels take, without the time that Python needs to launch them."""

from __future__ import annotations

from collections.abc import Callable

import torch

from benchmarks.context import Context
from benchmarks.failures import failures
from graphlora.benchmark.timing import Call, Stopwatch, describe_error


def capture(run: Callable[[], object], device: torch.device) -> torch.cuda.CUDAGraph:
    """`run` as one CUDA graph; a failure leaves the process usable.

    Args:
        run: leaves its results in memory that it allocates.
        device: where it runs.
    """
    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        for _ in range(3):
            run()
    torch.cuda.current_stream().wait_stream(stream)
    graph = torch.cuda.CUDAGraph()
    try:
        with torch.cuda.graph(graph):
            run()
    except failures():
        # A failed capture leaves the device's random generator waiting for the rest of the capture.
        index = torch.cuda.current_device() if device.index is None else device.index
        torch.cuda.default_generators[index].graphsafe_set_state(
            torch.Generator(device).graphsafe_get_state()
        )
        raise
    return graph


def time_graphs(context: Context, runs: dict[str, Callable[[], object]]) -> None:
    """Records the time of a replay as phase `graph` of every candidate; one that cannot be captured fails."""
    calls: dict[str, Call] = {}
    for name, run in runs.items():
        try:
            calls[name] = _replayed(capture(run, context.device))
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
