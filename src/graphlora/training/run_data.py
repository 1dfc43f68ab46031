"""The data of a run: rows to train on, rows and items to validate on."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from transformers import PreTrainedTokenizerBase

from graphlora.errors import GraphLoraError
from graphlora.tasks import Example, TextExample, load_examples, load_mixture
from graphlora.training.data import Encoded, Encoding, encode_all, prompt_template
from graphlora.training.recipe import Recipe


@dataclass
class RunData:
    """Rows and items of a run.

    Attributes:
        train: Token rows to train on.
        validation: Token rows to measure the loss on; `None` without validation.
        items: Multiple-choice items per task, to measure accuracy on.
        prompt_format: `"chat"` where training text went through the chat template, else `"plain"`.
        prompt_template: What the training prompts have around what differs.
    """

    train: Encoded
    validation: Encoded | None
    items: dict[str, list[Example]]
    prompt_format: str
    prompt_template: str


def load_data(recipe: Recipe, tokenizer: PreTrainedTokenizerBase) -> RunData:
    """Rows to train on, rows and items to validate on.

    Raises:
        GraphLoraError: Data that is missing, broken or too long.
    """
    how = Encoding(recipe.scoring, recipe.train_on, recipe.append_eos, recipe.max_length, recipe.truncation)
    seed = recipe.seed if recipe.limit_seed is None else recipe.limit_seed
    options = {"data_dir": recipe.data_dir, "seed": seed}
    weights = recipe.task if isinstance(recipe.task, dict) else None
    examples: list[Any] = (
        load_mixture(weights, "train", limit=recipe.train_limit, **options)
        if weights is not None
        else load_examples(str(recipe.task), "train", limit=recipe.train_limit, **options)
    )
    chat = any(isinstance(item, TextExample) and item.messages is not None for item in examples)
    form = ("chat" if chat else "plain", prompt_template(examples, recipe.scoring))
    train_rows = encode_all(examples, tokenizer, how)
    if recipe.eval_strategy == "no":
        return RunData(train_rows, None, {}, *form)
    held_out: dict[str, list[Any]] = {
        name: load_examples(name, "validation", limit=recipe.eval_limit, **options)
        for name in (weights if weights is not None else [str(recipe.task)])
    }
    everything = [item for part in held_out.values() for item in part]
    if not everything:
        raise GraphLoraError(
            f"task {recipe.task} has no validation rows; add some, or set eval_strategy to no"
        )
    items = {name: part for name, part in held_out.items() if part and isinstance(part[0], Example)}
    return RunData(train_rows, encode_all(everything, tokenizer, how), items, *form)


def default_metric(recipe: Recipe, data: RunData) -> str:
    """Metric that chooses the checkpoint where the recipe names none."""
    if not data.items:
        return "loss"
    return "acc_norm" if recipe.scoring == "cloze" else "acc"
