"""What a resumed run may change."""

from __future__ import annotations

import math
import sys
from dataclasses import fields

from graphlora.errors import GraphLoraError
from graphlora.training.processes import is_first
from graphlora.training.recipe import Recipe

FIXED_GROUPS = ("model", "adapter", "data")
FIXED = (
    "train_sampling_strategy",
    "optim",
    "loraplus_lr_ratio",
    "seed",
)
DEPENDS_ON_MACHINE = ("dtype", "max_length", "streaming")


def check_same_run(before: Recipe, now: Recipe, processes: tuple[int, int] = (1, 1)) -> None:
    """Refuse to go on with another model, adapter, data, order or number of rows per step; tell what else changed.

    Args:
        before: Recipe of the run so far.
        now: Recipe to go on with.
        processes: Number of processes before and now.

    Raises:
        GraphLoraError: Names the options that differ.
    """
    _check_rows_per_step(before, now, processes)
    changed = [item for item in fields(Recipe) if getattr(before, item.name) != getattr(now, item.name)]
    fixed = []
    for item in changed:
        is_fixed = item.metadata["group"] in FIXED_GROUPS or item.name in FIXED
        open_before = item.name in DEPENDS_ON_MACHINE and getattr(now, item.name) in (None, "auto")
        if is_fixed and not open_before:
            fixed.append(f"{item.name} ({getattr(before, item.name)!r}, now {getattr(now, item.name)!r})")
    if fixed:
        raise GraphLoraError(
            f"the run in {before.output_dir} was started with another {', '.join(fixed)}; "
            "resume with the same options, or choose another output_dir"
        )
    if not is_first():
        return
    if processes[0] != processes[1]:
        sys.stderr.write(f"going on with {processes[1]} process(es) in place of {processes[0]}\n")
    for item in changed:
        if item.name not in ("output_dir", "metric_for_best_model", *DEPENDS_ON_MACHINE):
            sys.stderr.write(
                f"going on with {item.name} {getattr(now, item.name)!r} in place of "
                f"{getattr(before, item.name)!r}\n"
            )


def _check_rows_per_step(before: Recipe, now: Recipe, processes: tuple[int, int]) -> None:
    """The rows of an optimizer step may be split in another way, over processes, batches or accumulation."""
    parts = [
        (count, recipe.per_device_train_batch_size, recipe.gradient_accumulation_steps)
        for count, recipe in zip(processes, (before, now), strict=True)
    ]
    (old, new), last = (math.prod(part) for part in parts), parts[1]
    if old == new:
        return
    texts = [f"{rows} rows ({n} x {b} x {a})" for rows, (n, b, a) in zip((old, new), parts, strict=True)]
    if old % (last[0] * last[1]) == 0:
        remedy = f"set gradient_accumulation_steps to {old // (last[0] * last[1])}"
    elif old % last[0] == 0:
        remedy = f"set per_device_train_batch_size to {old // last[0]} and gradient_accumulation_steps to 1"
    else:
        remedy = f"use a number of processes that divides {old}"
    raise GraphLoraError(
        f"the run in {before.output_dir} was started with another per_device_train_batch_size or number of processes: "
        f"its steps take {texts[0]}, now {texts[1]} (processes x per_device_train_batch_size x "
        f"gradient_accumulation_steps); {remedy}, or choose another output_dir"
    )
