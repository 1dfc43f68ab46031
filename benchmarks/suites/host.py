"""What holds a whole step: the host that launches it, or the device that runs it."""

from __future__ import annotations

import statistics
import time
from functools import partial

import torch

from benchmarks.candidates.models import ModelCandidate, model_config, random_tokens
from benchmarks.candidates.modes import candidate_in_mode
from benchmarks.context import Context
from benchmarks.kernels import kernels_of
from benchmarks.shapes import SHAPES
from graphlora.benchmark.random_model import random_model
from graphlora.benchmark.timing import release, synchronize

_REPEATS = 5


def measure(context: Context) -> None:
    """Measures one candidate after the other; none of the numbers is to be divided by another's.

    `host` is the time until a step is launched, the device idle before it; `in_a_row` that of a step among others of
    its own, which is the longer of host and device; `device` the sum of its kernels, `kernels` their number.
    """
    p = context.case.params
    shape = SHAPES[p["shape"]]
    base = random_model(model_config(shape, p["layers"]), context.device, context.dtype)
    ids = random_tokens(shape, p["batch"], p["length"], context.device)
    for name in p["candidates"]:
        for candidate in context.build(
            [name], lambda name: candidate_in_mode(name, base, context.device)
        ).values():
            _measure(context, name, candidate, ids)
        release(context.device)


def _measure(context: Context, name: str, candidate: ModelCandidate, ids: torch.Tensor) -> None:
    step = partial(candidate.step, ids)
    for _ in range(3):
        step()
    hosts = []
    for _ in range(_REPEATS):
        synchronize(context.device)
        start = time.perf_counter()
        step()
        hosts.append(1e3 * (time.perf_counter() - start))
    context.add(name, "host", statistics.median(hosts), low=min(hosts), high=max(hosts), iterations=_REPEATS)
    synchronize(context.device)
    start = time.perf_counter()
    for _ in range(_REPEATS):
        step()
    synchronize(context.device)
    context.add(name, "in_a_row", 1e3 * (time.perf_counter() - start) / _REPEATS, iterations=_REPEATS)
    if context.device.type == "cuda":
        found = kernels_of(step)
        context.add(
            name, "device", (found.micros.total() + found.copy_micros) / 1e3, kernels=found.lines()[:60]
        )
        context.add(name, "kernels", float(found.counts.total()), "launches")
