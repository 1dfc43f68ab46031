"""Row 12: a training step of a small model, where launches decide: eager, captured as a CUDA graph, compiled."""

from __future__ import annotations

from typing import Any, cast

import torch
from torch import Tensor

from benchmarks.candidates.ffn import compiler_of
from benchmarks.candidates.models import ModelCandidate, model_config, random_tokens, step_candidate
from benchmarks.context import Context
from benchmarks.shapes import SHAPES
from graphlora.benchmark.random_model import random_model
from graphlora.benchmark.timing import Call, Stopwatch
from graphlora.training.captured import CapturedSteps

# The name in the table: the candidate's step, and how it is run.
CANDIDATES: dict[str, tuple[str, str]] = {
    "frozen": ("frozen", "eager"),
    "peft": ("peft_float32_r8", "eager"),
    "peft_bfloat16": ("peft_bfloat16_r8", "eager"),
    "peft_graph": ("peft_float32_r8", "graph"),
    "triton": ("triton_r8", "eager"),
    "triton_graph": ("triton_r8", "graph"),
    "torch_graph": ("torch_r8", "graph"),
    "eager": ("eager_r8", "eager"),
    "peft_compiled": ("peft_float32_r8", "compile"),
    "triton_compiled": ("triton_r8", "compile"),
}


def measure(context: Context) -> None:
    """Times whole steps; the optimizer is AdamW outside of the graph for all."""
    p = context.case.params
    shape = SHAPES[p["shape"]]
    base = random_model(model_config(shape, shape.num_layers), context.device, context.dtype)
    ids = random_tokens(shape, p["batch"], p["length"], context.device)
    names = p.get("candidates", CANDIDATES)

    def make(name: str) -> Call:
        # On a CPU the kernels' names have become the PyTorch path's.
        source, mode = CANDIDATES[name if name in CANDIDATES else name.replace("torch", "triton")]
        candidate = step_candidate(context.stand_in(source), base)
        if mode == "graph":
            return _captured(candidate, ids, context.device)
        if mode == "compile":
            compiler = compiler_of(context.device)
            candidate.model = cast(Any, torch.compile(candidate.model, dynamic=False, backend=compiler))
        return candidate.call(ids)

    context.add_timings(context.interleave(context.build(names, make), warmup=5, iterations=30))


def _captured(candidate: ModelCandidate, ids: Tensor, device: torch.device) -> Call:
    """The step as `graphlora train` runs it with `step_mode: graph`."""
    steps = CapturedSteps(candidate.model, device=device)

    def forward_backward(inputs: dict[str, Any]) -> Tensor:
        return candidate.forward_backward(inputs["input_ids"]).detach()

    def call(watch: Stopwatch) -> None:
        steps(forward_backward, {"input_ids": ids})
        watch.lap("forward_backward")
        assert candidate.optimizer is not None
        candidate.optimizer.step()
        candidate.optimizer.zero_grad(set_to_none=True)
        watch.lap("optimizer")

    return call
