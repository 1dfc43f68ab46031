"""How a whole model's training step is run: kernel by kernel, recorded, compiled, with Liger's kernels."""

from __future__ import annotations

import sys
from typing import Any, cast
from unittest import mock

import torch
from torch import Tensor, nn
from transformers.integrations.liger import apply_liger_kernel
from transformers.trainer_utils import unwrap_peft_model

from benchmarks.candidates.ffn import compiler_of
from benchmarks.candidates.models import ModelCandidate, step_candidate
from benchmarks.failures import NotHere
from graphlora.benchmark.timing import Call, Stopwatch
from graphlora.training.captured import CapturedSteps
from graphlora.training.loss_kernel import fused_loss_options
from graphlora.tuner.compiled_layers import compile_layers

_ROTARY = "apply_rotary_pos_emb"
# Endings of a candidate's name.
MODES = ("graph", "compiled", "compiledgraph", "whole", "liger", "ligers")
_RECORDED = ("graph", "compiledgraph")


def split_mode(name: str) -> tuple[str, str | None]:
    """A candidate's name without its mode, and the mode."""
    source, _, mode = name.rpartition("_")
    return (source, mode) if mode in MODES else (name, None)


def is_recorded(name: str) -> bool:
    """Whether a candidate's step is recorded as a CUDA graph."""
    return split_mode(name)[1] in _RECORDED


def candidate_in_mode(name: str, base: nn.Module, device: torch.device) -> ModelCandidate:
    """`step_candidate`, its model compiled or with a fused loss where the name's ending says so.

    `compiled` are layers, last norm and loss as `graphlora train` compiles them, which also makes no masks for rows of
    equal length, `whole` is one program for the model; `liger`
    takes Liger's loss, which never holds all logits, and `ligers` its norms and rotary embedding as well; for `graph`
    and the second half of `compiledgraph` see `call_in_mode`.

    Raises:
        KeyError: an unknown name.
        NotHere: a mode that this machine or this model cannot have.
    """
    source, mode = split_mode(name)
    candidate = step_candidate(source, base)
    if mode in ("compiled", "compiledgraph"):
        compile_layers(candidate.model, backend=compiler_of(device))
        candidate.full_rows = True
    elif mode == "whole":
        compiled = torch.compile(candidate.model, dynamic=False, backend=compiler_of(device))
        candidate.model = cast(nn.Module, compiled)
    elif mode in ("liger", "ligers"):
        _apply_liger(candidate, device, norms=mode == "ligers")
    return candidate


def call_in_mode(name: str, candidate: ModelCandidate, ids: Tensor, device: torch.device) -> Call:
    """A step of what `candidate_in_mode` made, as a timed call; the optimizer is outside of the recorded part."""
    if not is_recorded(name):
        return candidate.call(ids)
    steps = CapturedSteps(candidate.model, device=device)
    inputs = {"input_ids": ids, "attention_mask": torch.ones_like(ids)}  # as a collator gives them

    def forward_backward(inputs: dict[str, Any]) -> Tensor:
        return candidate.forward_backward(**inputs).detach()

    def call(watch: Stopwatch) -> None:
        steps(forward_backward, inputs)
        watch.lap("forward_backward")
        if candidate.optimizer is not None:
            candidate.optimizer.step()
            candidate.optimizer.zero_grad(set_to_none=True)
        watch.lap("optimizer")

    return call


def _apply_liger(candidate: ModelCandidate, device: torch.device, norms: bool) -> None:
    """Liger's loss on this model alone, and with `norms` its norms and, while the model runs, its rotary embedding.

    Liger exchanges norms and rotary embedding for all models of the type in the process, present and future ones:
    that is undone, else every candidate would have them.
    """
    if device.type != "cuda":
        raise NotHere("Liger's kernels need a GPU")
    model = cast(Any, unwrap_peft_model(cast(Any, candidate.model)))
    try:
        options = fused_loss_options(model.config.model_type)
    except ImportError as error:
        raise NotHere("liger-kernel is not installed") from error
    assert options is not None
    code = sys.modules[type(model).__module__]
    before = dict(vars(code))
    apply_liger_kernel(model, options | dict.fromkeys(("rms_norm", "rope"), norms))
    exchanged = {name: value for name, value in vars(code).items() if before.get(name) is not value}
    for name in exchanged:
        setattr(code, name, before[name])
    if norms:
        rotary = exchanged[_ROTARY]
        candidate.around = lambda: mock.patch.object(code, _ROTARY, rotary)
