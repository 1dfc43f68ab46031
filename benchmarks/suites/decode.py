"""Row 10: one decode step with a static cache, captured as a CUDA graph, beside the frozen model's."""

from __future__ import annotations

from collections.abc import Callable
from typing import cast

import torch
from peft import get_peft_model
from torch import nn

from benchmarks.candidates.models import graphlora_config, lora_config, model_config
from benchmarks.context import Context
from benchmarks.failures import NotHere
from benchmarks.shapes import SHAPES
from graphlora.benchmark.random_model import random_model, twin, wake
from graphlora.benchmark.timing import Call, Stopwatch

CANDIDATES = ("frozen", "triton", "peft", "torch")


def measure(context: Context) -> None:
    """Replays one captured decode step per candidate, in turns.

    Raises:
        NotHere: no GPU.
    """
    if context.device.type != "cuda":
        raise NotHere("decode steps are captured on a GPU")
    from graphlora.evaluation.decoding import captured_decode_step

    p = context.case.params
    base = random_model(model_config(SHAPES[p["shape"]], p["layers"]), context.device, context.dtype)

    def make(name: str) -> Call:
        model = twin(base)
        if name == "peft":
            model = get_peft_model(model, lora_config(8), autocast_adapter_dtype=False)
        elif name != "frozen":
            model = get_peft_model(model, graphlora_config(8, name))
        wake(model)
        cast(nn.Module, model).eval()
        with torch.no_grad():
            return _replayed(captured_decode_step(model, p["batch"], p["context"]))

    context.add_timings(context.interleave(context.build(CANDIDATES, make), warmup=5, iterations=50))


def _replayed(replay: Callable[[], object]) -> Call:
    def call(watch: Stopwatch) -> None:
        replay()
        watch.lap("replay")

    return call
