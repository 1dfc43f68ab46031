"""A model under EleutherAI's lm-evaluation-harness, with results in the form of our own scoring."""

from __future__ import annotations

import logging
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from typing import Any

from torch import nn

from graphlora.errors import GraphLoraError
from graphlora.evaluation.encoding import units
from graphlora.evaluation.forward import Forward, evaluating
from graphlora.evaluation.harness_tasks import HarnessTask, require_harness
from graphlora.evaluation.multiple_choice import ItemResult, item_results, summarize

BATCH_SIZE = 8
FEWSHOT_SEED = 1234  # the harness's own
NOT_METRICS = ("alias", "name", "sample_len", "sample_count")


@dataclass(frozen=True)
class HarnessResult:
    """What the harness found for one task.

    Attributes:
        summary: As of `graphlora.evaluation.multiple_choice.summarize`, with the harness's own `acc`, `acc_norm` and
            standard errors. For the harness's own tasks its metrics under their names, with the filter after a comma
            where it has several.
        items: Scores of every item in our form; `None` for the harness's own data.
    """

    summary: dict[str, Any]
    items: tuple[ItemResult, ...] | None = None


class _Loaded:
    """A model as it is: the harness ties the weights of a module anew, which fails where PEFT replaced a tied head."""

    def __init__(self, model: nn.Module) -> None:
        self._loaded = model

    def __getattr__(self, name: str) -> Any:
        return getattr(self._loaded, name)

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        return self._loaded(*args, **kwargs)


def run_harness(
    model: nn.Module,
    tokenizer: Any,
    tasks: Sequence[HarnessTask],
    *,
    batch_size: int = BATCH_SIZE,
    limit: int | None = None,
    truncate: bool = False,
) -> dict[str, HarnessResult]:
    """Hand a loaded model to the harness, with its active adapter, on its device and in its dtype.

    Likelihoods are computed in float32, as our own scoring does; the harness alone would take the model's dtype.

    Args:
        model: A causal language model of transformers, wrapped by PEFT or not.
        tokenizer: Its tokenizer.
        tasks: What `load_harness_tasks` gave.
        batch_size: Texts per batch.
        limit: First documents per task of the harness's own; our tasks are limited where they are loaded.
        truncate: Cut the beginnings of our tasks' prompts that do not fit the model's window, instead of refusing.
            In its own tasks the harness always cuts.

    Returns:
        A result for each task's name. Groups and tags of the harness's own have one for each of their tasks too.

    Raises:
        GraphLoraError: The harness is not installed, an encoder-decoder model, an item that does not fit the window,
            or a batch size or limit below 1.
    """
    require_harness()
    for name, value in (("batch_size", batch_size), ("limit", limit)):
        if value is not None and value < 1:
            raise GraphLoraError(f"{name} is {value}; give at least 1")
    forward = Forward(model)
    found: dict[str, HarnessResult] = {}
    encoded = {
        task.name: units(task.examples, tokenizer, "cloze", forward.window, truncate)
        for task in tasks
        if task.examples is not None
    }
    with evaluating(model):
        language_model = _language_model(model, tokenizer, forward.window, batch_size)
        for task in tasks:
            output = _evaluate(language_model, task, limit if task.examples is None else None)
            if task.examples is None:
                found |= {name: HarnessResult(summary) for name, summary in _own_summaries(output).items()}
                continue
            (key,) = output["results"]
            scores = _scores(output["samples"][key])
            items = item_results(task.examples, encoded[task.name], scores, "cloze")
            summary = _summary(output, key)
            if "acc_norm" not in summary:
                items = [replace(item, prediction_norm=None) for item in items]
            found[task.name] = HarnessResult(summarize(items) | summary, tuple(items))
    return found


def compared(harness: Sequence[ItemResult], own: Sequence[ItemResult]) -> dict[str, Any]:
    """How far the harness and our own scoring are apart.

    Args:
        harness: The harness's results.
        own: Ours of the same items, with cloze scoring.

    Returns:
        `largest_gap`, the largest difference between two log-likelihoods of one choice, and `different`, one entry
        per item and metric whose picks differ: `id`, `metric` (`"acc"` or `"acc_norm"`), `gold`, and the positions
        picked, `harness` and `own`.

    Raises:
        GraphLoraError: The items are not the same.
    """
    if [item.id for item in harness] != [item.id for item in own]:
        raise GraphLoraError("lm-eval and graphlora did not score the same items; compare equal splits")
    gap, different = 0.0, []
    for theirs, ours in zip(harness, own, strict=True):
        gap = max(gap, *(abs(a - b) for a, b in zip(theirs.scores, ours.scores, strict=True)))
        picks = {"acc": (theirs.prediction, ours.prediction)}
        if theirs.prediction_norm is not None and ours.prediction_norm is not None:
            picks["acc_norm"] = (theirs.prediction_norm, ours.prediction_norm)
        different += [
            {"id": ours.id, "metric": metric, "gold": ours.gold, "harness": pair[0], "own": pair[1]}
            for metric, pair in picks.items()
            if pair[0] != pair[1]
        ]
    return {"largest_gap": gap, "different": different}


def _language_model(model: nn.Module, tokenizer: Any, window: int | None, batch_size: int) -> Any:
    from lm_eval.models.huggingface import HFLM  # pyright: ignore[reportMissingImports]  # an extra

    # The harness's decorators hide its signatures from type checkers.
    harness_model: Any = HFLM
    arguments: dict[str, Any] = {} if window is None else {"max_length": window}
    # It warns that the arguments for loading a model are ignored; none are given.
    with _only_errors("lm_eval.models.huggingface"):
        return harness_model(
            pretrained=_Loaded(model),
            tokenizer=tokenizer,
            backend="causal",
            batch_size=batch_size,
            softmax_dtype="float32",
            **arguments,
        )


def _evaluate(language_model: Any, task: HarnessTask, limit: int | None) -> dict[str, Any]:
    from lm_eval import evaluate  # pyright: ignore[reportMissingImports]  # an extra

    run: Any = evaluate
    for part in task.loaded["tasks"].values():
        if part.get_config("num_fewshot") is None:
            part.set_config("num_fewshot", 0)
        part.set_fewshot_seed(FEWSHOT_SEED)
    return run(language_model, task_dict=task.loaded, limit=limit, log_samples=task.examples is not None)


def _scores(samples: Sequence[dict[str, Any]]) -> list[list[float]]:
    """Log-likelihoods of each item's choices, in the order of the rows."""
    ordered = sorted(samples, key=lambda sample: sample["doc_id"])
    return [[float(score) for score, _ in sample["filtered_resps"]] for sample in ordered]


def _own_summaries(output: dict[str, Any]) -> dict[str, dict[str, Any]]:
    names = dict.fromkeys([*output.get("groups", {}), *output["results"]])
    return {name: _summary(output, name) for name in names}


def _summary(output: dict[str, Any], name: str) -> dict[str, Any]:
    """Metrics of one task or group, their standard errors (`None` where there is none), the number of items."""
    values = output["results"].get(name) or output["groups"][name]
    summary: dict[str, Any] = {}
    for key, value in values.items():
        metric, _, chosen = key.partition(",")
        if metric in NOT_METRICS:
            continue
        label = metric if chosen in ("", "none") else key
        summary[label] = value if isinstance(value, (int, float)) else None
    return {"n": values["sample_len"], **summary, "task_version": output["versions"].get(name)}


@contextmanager
def _only_errors(logger: str) -> Iterator[None]:
    log = logging.getLogger(logger)
    level = log.level
    log.setLevel(logging.ERROR)
    try:
        yield
    finally:
        log.setLevel(level)
