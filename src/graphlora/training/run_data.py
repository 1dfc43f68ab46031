"""The data of a run: rows to train on, rows and items to validate on."""

from __future__ import annotations

import itertools
import sys
from dataclasses import dataclass, replace
from typing import Any

from transformers import PreTrainedTokenizerBase

from graphlora.errors import GraphLoraError
from graphlora.records import data_hash
from graphlora.tasks import Example, TextExample, load_examples, load_mixture
from graphlora.tasks.stream import ExampleStream, StreamPlace
from graphlora.tasks.stream_sources import HubSource, data_bytes, is_pattern, open_source
from graphlora.training.data import Encoded, Encoding, encode_all, prompt_template
from graphlora.training.recipe import Recipe
from graphlora.training.streaming import FitsLength, TokenStream

STREAM_ABOVE = 1 << 30
STREAM_EVAL_ROWS = 1000
SAMPLE_ROWS = 100


@dataclass
class RunData:
    """Rows and items of a run.

    Attributes:
        train: Token rows to train on, held or streamed.
        validation: Token rows to measure the loss on; `None` without validation.
        items: Multiple-choice items per task, to measure accuracy on.
        prompt_format: `"chat"` where training text went through the chat template, else `"plain"`.
        prompt_template: What the training prompts have around what differs.
    """

    train: Encoded | TokenStream
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
    if recipe.streaming:
        return _load_stream(recipe, tokenizer, how)
    seed = recipe.seed if recipe.limit_seed is None else recipe.limit_seed
    options = {"data_dir": recipe.data_dir, "seed": seed}
    weights = recipe.task if isinstance(recipe.task, dict) else None
    examples: list[Any] = (
        load_mixture(weights, "train", limit=recipe.train_limit, **options)
        if weights is not None
        else load_examples(str(recipe.task), "train", limit=recipe.train_limit, **options)
    )
    form = _form(examples, recipe)
    train_rows = encode_all(examples, tokenizer, how)
    if recipe.eval_strategy == "no":
        return RunData(train_rows, None, {}, *form)
    held_out: dict[str, list[Any]] = {
        name: load_examples(name, "validation", limit=recipe.eval_limit, **options)
        for name in (weights if weights is not None else [str(recipe.task)])
    }
    return RunData(train_rows, *_validation(held_out, recipe, tokenizer, how), *form)


def wants_streaming(recipe: Recipe) -> bool:
    """Whether rows are read while training: as the recipe says, else where the local data is large or a pattern."""
    if recipe.streaming is not None:
        return recipe.streaming
    specs = list(recipe.task) if isinstance(recipe.task, dict) else [recipe.task]
    if any(map(is_pattern, specs)):
        return True
    return recipe.train_limit is None and data_bytes(specs) > STREAM_ABOVE


def _load_stream(recipe: Recipe, tokenizer: PreTrainedTokenizerBase, how: Encoding) -> RunData:
    weights = recipe.task if isinstance(recipe.task, dict) else {recipe.task: 1.0}
    sources = [open_source(name, "train", recipe.data_dir) for name in weights]
    keeps = FitsLength(tokenizer, how) if how.truncation == "drop" else None
    block = 1 if recipe.train_sampling_strategy == "sequential" else recipe.shuffle_buffer_size
    stream = ExampleStream(sources, list(weights.values()), block, recipe.seed, keeps)
    if recipe.max_steps <= 0:
        if any(isinstance(source, HubSource) for source in sources):
            raise GraphLoraError(
                f"num_train_epochs is {recipe.num_train_epochs}, but the rows of a hub data set that is streamed are "
                "not counted; give max_steps"
            )
        sys.stderr.write(f"counting the rows of {', '.join(weights)} (max_steps would spare it)\n")
        stream = replace(stream, epoch_rows=stream.count())
    sample = [example for example, _ in itertools.islice(stream.rows(StreamPlace()), SAMPLE_ROWS)]
    fingerprint = data_hash([source.fingerprint() for source in sources])
    train = TokenStream(stream, tokenizer, how, fingerprint)
    if recipe.eval_strategy == "no":
        return RunData(train, None, {}, *_form(sample, recipe))
    limit = recipe.eval_limit or STREAM_EVAL_ROWS
    held_out: dict[str, list[Any]] = {
        name: list(itertools.islice(open_source(name, "validation", recipe.data_dir).one_pass(), limit))
        for name in weights
    }
    return RunData(train, *_validation(held_out, recipe, tokenizer, how), *_form(sample, recipe))


def _validation(
    held_out: dict[str, list[Any]], recipe: Recipe, tokenizer: PreTrainedTokenizerBase, how: Encoding
) -> tuple[Encoded, dict[str, list[Example]]]:
    everything = [item for part in held_out.values() for item in part]
    if not everything:
        raise GraphLoraError(
            f"task {recipe.task} has no validation rows; add some, or set eval_strategy to no"
        )
    items = {name: part for name, part in held_out.items() if part and isinstance(part[0], Example)}
    return encode_all(everything, tokenizer, how), items


def _form(examples: list[Any], recipe: Recipe) -> tuple[str, str]:
    """Format of the prompts and what they share."""
    chat = any(isinstance(item, TextExample) and item.messages is not None for item in examples)
    return "chat" if chat else "plain", prompt_template(examples, recipe.scoring)


def chosen_metric(recipe: Recipe, data: RunData) -> str:
    """Metric that chooses the checkpoint: the recipe's, else the task's accuracy, or the loss of free text.

    Raises:
        GraphLoraError: The recipe's metric is none that validation measures; names those that are.
    """
    accuracies = ["acc_norm", "acc"] if recipe.scoring == "cloze" else ["acc"]
    measured = ["loss"] if not data.items else [*accuracies, "loss"]
    if recipe.metric_for_best_model is None:
        return measured[0]
    if len(data.items) > 1:
        measured += [f"{task}_{name}" for task in data.items for name in accuracies]
    name = recipe.metric_for_best_model
    if data.validation is not None and name.removeprefix("eval_") not in measured:
        raise GraphLoraError(
            f"metric_for_best_model is {name!r}, which validation on {recipe.task} with {recipe.scoring} scoring does "
            f"not measure; use one of {', '.join(measured)}, or leave it out for {measured[0]}"
        )
    return name
