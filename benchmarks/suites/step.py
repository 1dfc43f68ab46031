"""Rows 3, 4 and 5, and the full models: a whole training step, its peak memory, tokens per second and MFU."""

from __future__ import annotations

import torch

from benchmarks.candidates.models import (
    ModelCandidate,
    active_adapter_weights,
    model_config,
    random_tokens,
    step_flops,
)
from benchmarks.candidates.modes import call_in_mode, candidate_in_mode, is_recorded
from benchmarks.context import Context
from benchmarks.failures import failures
from benchmarks.shapes import SHAPES
from benchmarks.suites.ceilings import gemm_rate
from graphlora.benchmark.memory import measure_memory
from graphlora.benchmark.random_model import random_model
from graphlora.benchmark.timing import describe_error, release


def measure(context: Context) -> None:
    """Times a step of every candidate on the same base weights and the same batch, then measures its peak memory.

    A timed step has one of the same candidate before it, as in training.
    """
    p = context.case.params
    shape, layers, batch, length = SHAPES[p["shape"]], p["layers"], p["batch"], p["length"]
    base = random_model(model_config(shape, layers), context.device, context.dtype)
    ids = random_tokens(shape, batch, length, context.device)
    made = context.build(p["candidates"], lambda name: candidate_in_mode(name, base, context.device))
    calls = {name: call_in_mode(name, c, ids, context.device) for name, c in made.items()}
    context.seconds = p.get("seconds", context.seconds)
    result = context.interleave(calls, warmup=3, iterations=p.get("iterations", 12), in_a_row=p["in_a_row"])
    context.add_timings(result)
    peak = gemm_rate(context.device, context.dtype, 8192 if context.device.type == "cuda" else 64)
    for name, timings in result.timings.items():
        seconds = timings["full"].median / 1e3
        flops = step_flops(shape, layers, batch * length, length, active_adapter_weights(made[name].model))
        context.add(name, "tokens_per_second", batch * length / seconds, "tokens/s")
        context.add(
            name, "mfu", flops / seconds / peak, "share", flops=flops, peak_flops=peak,
            counted="4 N_matmul + 6 N_adapter (selected experts) + causal attention",
        )  # fmt: skip
        context.add(name, "trained", float(sum(p.numel() for p in made[name].trained)), "parameters")
        # What a recorded step takes stays allocated and has no peak.
        if not is_recorded(name):
            _measure_peak(context, name, made[name], ids)


def _measure_peak(context: Context, name: str, candidate: ModelCandidate, ids: torch.Tensor) -> None:
    release(context.device)
    try:
        with measure_memory(context.device) as memory:
            candidate.step(ids)
    except failures() as error:
        context.fail(name, describe_error(error), "peak_memory")
        return
    own = candidate.own_bytes()
    context.add(name, "peak_memory", float(own + memory.peak), "bytes", own_bytes=own, step_bytes=memory.peak)
