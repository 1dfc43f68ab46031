"""The loader of a streamed run: its length in steps, who gets which rows, and where it goes on."""

from __future__ import annotations

import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

from transformers import TrainerState, TrainingArguments

from graphlora.training.checkpoints import STATE_FILE
from graphlora.training.recipe import Recipe
from graphlora.training.streaming import Deal, StreamLoader, TokenStream, read_place


def stream_loader(
    stream: TokenStream,
    recipe: Recipe,
    arguments: TrainingArguments,
    collate: Callable[[Any], Any],
    checkpoint: Path | None,
) -> StreamLoader:
    """Loader of this process; also gives `arguments` the number of steps, as the loader has no end.

    Args:
        stream: The rows.
        recipe: The run.
        arguments: Arguments of the trainer, changed in place.
        collate: Makes a batch of token rows.
        checkpoint: Where the run goes on from: after the last row that was trained on, with any number of processes.

    Raises:
        GraphLoraError: The checkpoint does not say where it is in the data.
    """
    place, step = None, 0
    if checkpoint is not None:
        place = read_place(checkpoint, stream, lambda line: sys.stderr.write(f"{line}\n"))
        step = TrainerState.load_from_json(str(checkpoint / STATE_FILE)).global_step
    count = stream.examples.epoch_rows
    deal = Deal(
        rank=arguments.process_index,
        ranks=arguments.world_size,
        batch_size=arguments.train_batch_size,
        micro_batches=recipe.gradient_accumulation_steps,
        total_rows=None if count is None else max(1, int(count * recipe.num_train_epochs + 1e-9)),
    )
    if deal.total_rows is not None:
        arguments.max_steps = step + deal.num_steps(0 if place is None else place.row)
    # The loader starts at the place itself, so nothing is skipped by reading it.
    arguments.ignore_data_skip = True
    workers = arguments.dataloader_num_workers
    ahead = {"prefetch_factor": arguments.dataloader_prefetch_factor} if workers else {}
    return StreamLoader(
        stream,
        deal,
        collate,
        place,
        num_batches=max(0, arguments.max_steps - step) * recipe.gradient_accumulation_steps,
        num_workers=workers,
        device=arguments.device,
        non_blocking=bool(getattr(arguments.accelerator_config, "non_blocking", False)),
        pin_memory=arguments.dataloader_pin_memory,
        **ahead,
    )
