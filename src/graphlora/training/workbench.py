"""What a run takes from its surroundings: runs that share a model and data need not load them again."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import torch
from transformers import PreTrainedModel, PreTrainedTokenizerBase, TrainerCallback

from graphlora.training.loading import load_base_model, load_tokenizer
from graphlora.training.recipe import Recipe
from graphlora.training.run_data import RunData, load_data

if TYPE_CHECKING:
    from graphlora.training.trainer import AdapterTrainer


class Workbench:
    """The surroundings of a single run: everything is loaded for it, and the terminal is its own.

    Attributes:
        quiet: Say nothing on the terminal.
        takes_signals: Whether Ctrl-C and SIGTERM save a checkpoint; otherwise they end the run where it is.
    """

    quiet = False
    takes_signals = True

    def tokenizer(self, recipe: Recipe) -> PreTrainedTokenizerBase:
        """Tokenizer of the base model; see `load_tokenizer`."""
        return load_tokenizer(recipe.model)

    def base_model(self, recipe: Recipe, dtype: torch.dtype, device: torch.device) -> PreTrainedModel:
        """Base model without an adapter; see `load_base_model`. The trainer moves it to the device."""
        del device
        return load_base_model(
            recipe.model,
            dtype,
            attn_implementation=recipe.attn_implementation,
            load_in_4bit=recipe.load_in_4bit,
        )

    def data(self, recipe: Recipe, tokenizer: PreTrainedTokenizerBase) -> RunData:
        """Rows and items of the run, which must not be changed; see `load_data`."""
        return load_data(recipe, tokenizer)

    def callbacks(self, trainer: AdapterTrainer) -> list[TrainerCallback | Any]:
        """Further callbacks of the trainer."""
        del trainer
        return []
