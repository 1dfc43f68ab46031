"""Rows of many lengths in one step: padded, joined in one sequence, and joined in blocks."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch.nn.utils.rnn import pad_sequence

from benchmarks.candidates.models import model_config, random_rows, step_candidate
from benchmarks.context import Context
from benchmarks.shapes import SHAPES
from benchmarks.suites.cpu import ask_for_hardware
from graphlora.benchmark.random_model import random_model
from graphlora.benchmark.timing import Call, Stopwatch
from graphlora.training.data import IGNORED, AnswerLogits, packing_collator
from graphlora.training.packing import (
    TOKEN_MASK,
    BlockCollator,
    blocked_attention,
    few_shapes,
    launched,
    packed_attention_mask,
)

Rows = list[dict[str, list[int]]]
# A timed step has another batch each time, of another length, as in training.
BATCHES = 8


def measure(context: Context) -> None:
    """Times forward and backward of one adapted model; each candidate is a way to make a batch of the same rows.

    `one_sequence` is what `DataCollatorWithFlattening` makes, `blocks` what launched steps get, `few_shapes` recorded
    and compiled ones; `tokens` are those of a batch, padding included, on average.
    """
    if context.device.type == "cpu":
        ask_for_hardware(context.dtype)
    p = context.case.params
    shape = SHAPES[p["shape"]]
    base = random_model(model_config(shape, p["layers"]), context.device, context.dtype)
    model = context.build([p["model"]], lambda name: step_candidate(name, base))
    if not model:
        return
    (candidate,) = model.values()
    count = BATCHES * p["rows"]
    rows = random_rows(shape, count, p["shortest"], p["longest"])
    batches = [rows[first : first + p["rows"]] for first in range(0, count, p["rows"])]
    calls = {name: _call(candidate.model, name, batches, context) for name in _collators(context.device)}
    context.seconds = p["seconds"]
    result = context.interleave(calls, warmup=1, iterations=2 * BATCHES)
    context.add_timings(result)
    for name, collate in _collators(context.device).items():
        laid = [collate(batch)["input_ids"].numel() for batch in batches]
        context.add(
            name,
            "tokens",
            sum(laid) / len(laid),
            "tokens",
            counted=sum(len(r["input_ids"]) for r in rows) / BATCHES,
        )


def _collators(device: torch.device) -> dict[str, Callable[[Rows], dict[str, Any]]]:
    return {
        "padded": AnswerLogits(_padded),
        "one_sequence": AnswerLogits(packing_collator()),
        "blocks": AnswerLogits(BlockCollator(0, launched(device))),
        "few_shapes": AnswerLogits(BlockCollator(0, few_shapes)),
    }


def _padded(rows: Rows) -> dict[str, Any]:
    ids, labels = ([torch.tensor(row[name]) for row in rows] for name in ("input_ids", "labels"))
    mask = pad_sequence([torch.ones_like(row) for row in ids], batch_first=True)
    padded = pad_sequence(labels, batch_first=True, padding_value=IGNORED)
    return {"input_ids": pad_sequence(ids, batch_first=True), "attention_mask": mask, "labels": padded}


def _call(model: Any, name: str, batches: Sequence[Rows], context: Context) -> Call:
    collate = _collators(context.device)[name]
    made = [{k: v.to(context.device) for k, v in collate(batch).items()} for batch in batches]
    turn = iter(range(10**9))

    def call(watch: Stopwatch) -> None:
        batch = dict(made[next(turn) % len(made)])
        counted = batch.pop(TOKEN_MASK, None)
        if counted is not None:
            batch["attention_mask"] = packed_attention_mask(batch["position_ids"], counted, None)
        with blocked_attention(model.get_base_model(), counted is not None):
            model(**batch, use_cache=False).loss.backward()
        for parameter in model.parameters():
            parameter.grad = None
        watch.lap("forward_backward")

    return call
