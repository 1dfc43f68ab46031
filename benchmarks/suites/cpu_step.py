"""Row 11's whole step: a small model on a CPU, in float32 and bfloat16."""

from __future__ import annotations

import torch

from benchmarks.candidates.models import model_config, random_tokens, step_candidate
from benchmarks.context import Context
from benchmarks.shapes import SHAPES
from benchmarks.suites.cpu import ask_for_hardware
from graphlora.benchmark.random_model import random_model


def measure(context: Context) -> None:
    """Times forward, loss, backward and AdamW of every candidate on the same base weights and the same batch."""
    ask_for_hardware(context.dtype)
    p = context.case.params
    shape = SHAPES[p["shape"]]
    base = random_model(model_config(shape, shape.num_layers), context.device, context.dtype)
    ids = random_tokens(shape, p["batch"], p["length"], context.device)
    made = context.build(p["candidates"], lambda name: step_candidate(name, base).call(ids))
    result = context.interleave(made, warmup=1, iterations=8)
    context.add_timings(result, {name: {"threads": torch.get_num_threads()} for name in made})
