"""A recipe made independent of the place and the machine it was written on."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch

from graphlora.errors import GraphLoraError
from graphlora.tasks.stream_sources import is_pattern
from graphlora.training.loading import resolve_path
from graphlora.training.recipe import Recipe
from graphlora.training.run_data import wants_streaming


def located(recipe: Recipe) -> Recipe:
    """The recipe with absolute paths, so that it can be run again from anywhere."""
    tasks = recipe.task
    return recipe.changed(
        model=resolve_path(recipe.model),
        data_dir=None if recipe.data_dir is None else resolve_path(recipe.data_dir),
        output_dir=str(Path(recipe.output_dir).expanduser().resolve()),
        task=_located_task(tasks)
        if isinstance(tasks, str)
        else {_located_task(name): weight for name, weight in tasks.items()},
    )


def completed(recipe: Recipe, config: Any, dtype: torch.dtype) -> Recipe:
    """The recipe with the values that depend on the model and the machine.

    Raises:
        GraphLoraError: `max_length` beyond the model's window.
    """
    window = getattr(config.get_text_config(), "max_position_embeddings", None)
    length = recipe.max_length
    if length is not None and window is not None and length > window:
        raise GraphLoraError(f"max_length is {length} and the model's window is {window} tokens; lower it")
    return recipe.changed(
        max_length=length if length is not None else window,
        dtype=str(dtype).removeprefix("torch."),
        streaming=wants_streaming(recipe),
    )


def _located_task(task: str) -> str:
    if is_pattern(task):
        return str(Path(task).expanduser().absolute())
    return resolve_path(task) if "." in Path(task).name or "/" in task else task
