"""Row 8: kernels launched by one FFN block, forward and backward, its router included; syncs; graph capture."""

from __future__ import annotations

from functools import partial

import torch

from benchmarks.candidates.ffn import FfnBench, FfnCandidate
from benchmarks.context import Context
from benchmarks.failures import NotHere, failures
from benchmarks.graphs import capture
from benchmarks.kernels import kernels_of
from benchmarks.shapes import SHAPES
from graphlora.benchmark.timing import describe_error, release

# The name in the table, and the candidate behind it: the whole adapted block as a model runs it.
CANDIDATES = {
    "triton": "triton_layer",
    "triton_without_router": "triton",
    "torch": "torch_layer",
    "frozen": "frozen",
    "peft_float32": "peft_float32",
    "peft_bfloat16": "peft_bfloat16",
    "eager": "eager_layer",
}


def measure(context: Context) -> None:
    """Counts kernels with their names and times, then runs the block where every sync is an error, then captures it.

    Raises:
        NotHere: no GPU.
    """
    if context.device.type != "cuda":
        raise NotHere("kernel launches are counted on a GPU")
    p = context.case.params
    bench = FfnBench(SHAPES[p["shape"]], p["r"], p["tokens"], "balanced", context.device, context.dtype)
    made = context.build(CANDIDATES, lambda name: bench.candidate(CANDIDATES[name]))
    for name, candidate in made.items():
        try:
            for _ in range(3):
                candidate.gradients(bench.x, bench.dy)
            torch.cuda.synchronize()
            _count(context, name, candidate, bench)
            _find_syncs(context, name, candidate, bench)
        except failures() as error:
            context.fail(name, describe_error(error), "kernels")
    # Last, because a failed capture can leave the stream unusable.
    syncing = {m.candidate for m in context.found if m.phase == "syncs" and m.value}
    for name, candidate in made.items():
        if name in syncing:
            context.add(name, "not_capturable", 1.0, "blocks", first="reads values on the host")
        else:
            _try_capture(context, name, candidate, bench)
        release(context.device)


def _count(context: Context, name: str, candidate: FfnCandidate, bench: FfnBench) -> None:
    found = kernels_of(partial(candidate.gradients, bench.x, bench.dy))
    context.add(
        name, "kernels", float(found.counts.total()), "launches",
        copies_and_fills=found.copies, kernels=found.lines(),
    )  # fmt: skip


def _find_syncs(context: Context, name: str, candidate: FfnCandidate, bench: FfnBench) -> None:
    torch.cuda.set_sync_debug_mode("error")
    try:
        candidate.gradients(bench.x, bench.dy)
        context.add(name, "syncs", 0.0, "syncs")
    except RuntimeError as error:
        if "synchroniz" not in str(error):
            raise
        context.add(name, "syncs", 1.0, "syncs", first=describe_error(error))
    finally:
        torch.cuda.set_sync_debug_mode("default")


def _try_capture(context: Context, name: str, candidate: FfnCandidate, bench: FfnBench) -> None:
    try:
        graph = capture(partial(candidate.gradients, bench.x, bench.dy), bench.device)
        graph.replay()
        torch.cuda.synchronize()
        context.add(name, "not_capturable", 0.0, "blocks")
    except failures() as error:
        context.add(name, "not_capturable", 1.0, "blocks", first=describe_error(error))
