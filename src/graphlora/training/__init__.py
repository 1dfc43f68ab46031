"""Fine-tuning from a recipe: data, the Hugging Face `Trainer`, checkpoints, and the record of a run."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from graphlora.training.recipe import Recipe
    from graphlora.training.run import TrainResult, train

__all__ = ["Recipe", "TrainResult", "train"]


def __getattr__(name: str) -> Any:
    """Import on first use: a recipe can be read and checked without importing torch."""
    if name == "Recipe":
        from graphlora.training.recipe import Recipe

        return Recipe
    if name in __all__:
        from graphlora.training import run

        return getattr(run, name)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
