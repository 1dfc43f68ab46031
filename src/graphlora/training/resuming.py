"""What a resumed run may change."""

from __future__ import annotations

import sys
from dataclasses import fields

from graphlora.errors import GraphLoraError
from graphlora.training.recipe import Recipe

FIXED_GROUPS = ("model", "adapter", "data")
FIXED = (
    "per_device_train_batch_size",
    "gradient_accumulation_steps",
    "train_sampling_strategy",
    "optim",
    "loraplus_lr_ratio",
    "seed",
)
PARTS_OF_A_STEP = ("per_device_train_batch_size", "gradient_accumulation_steps")
DEPENDS_ON_MACHINE = ("dtype", "max_length", "streaming")


def check_same_run(before: Recipe, now: Recipe) -> None:
    """Refuse to go on with another model, adapter, data or order; tell what else changed.

    Raises:
        GraphLoraError: Names the options that differ.
    """
    changed = [item for item in fields(Recipe) if getattr(before, item.name) != getattr(now, item.name)]
    fixed = []
    for item in changed:
        # A stream goes on after its last row, whatever the steps are made of.
        is_free = now.streaming is not False and before.streaming is True and item.name in PARTS_OF_A_STEP
        is_fixed = item.metadata["group"] in FIXED_GROUPS or (item.name in FIXED and not is_free)
        open_before = item.name in DEPENDS_ON_MACHINE and getattr(now, item.name) in (None, "auto")
        if is_fixed and not open_before:
            fixed.append(f"{item.name} ({getattr(before, item.name)!r}, now {getattr(now, item.name)!r})")
    if fixed:
        raise GraphLoraError(
            f"the run in {before.output_dir} was started with another {', '.join(fixed)}; "
            "resume with the same options, or choose another output_dir"
        )
    for item in changed:
        if item.name not in ("output_dir", "metric_for_best_model", *DEPENDS_ON_MACHINE):
            sys.stderr.write(
                f"going on with {item.name} {getattr(now, item.name)!r} in place of "
                f"{getattr(before, item.name)!r}\n"
            )
