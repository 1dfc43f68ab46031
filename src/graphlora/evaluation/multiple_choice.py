"""Multiple-choice accuracy by the likelihood of the answers' texts (`cloze`) or labels (`letter`)."""

from __future__ import annotations

import json
import math
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, get_args

from torch import nn
from tqdm import tqdm

from graphlora.errors import GraphLoraError
from graphlora.evaluation.encoding import Scoring, Unit, units
from graphlora.evaluation.forward import Forward, batches, evaluating
from graphlora.records import write_text
from graphlora.tasks.example import Example

TOKENS_PER_BATCH = {"cpu": 4096}
TOKENS_PER_BATCH_ACCELERATOR = 16384


@dataclass(frozen=True)
class ItemResult:
    """Scores of one item.

    Attributes:
        id: Identifier of the example.
        gold: Position of the right choice.
        scores: Cloze: summed log-likelihood of each choice. Letter: logit of each label.
        prediction: Position of the highest score; the first of equals.
        prediction_norm: Cloze: position of the highest score per character of the choice; letter: `None`.
        tokens: Tokens that were scored or read as context, each once.
        truncated: Whether a context was cut to fit the model's window.
        domain: Domain of the example.
        kind: Kind of the example.
    """

    id: str
    gold: int
    scores: tuple[float, ...]
    prediction: int
    prediction_norm: int | None
    tokens: int
    truncated: bool = False
    domain: str | None = None
    kind: str | None = None

    @property
    def correct(self) -> bool:
        """Whether the highest score is the right choice's."""
        return self.prediction == self.gold

    @property
    def correct_norm(self) -> bool | None:
        """Whether the highest score per character is the right choice's; `None` for letter scoring."""
        return None if self.prediction_norm is None else self.prediction_norm == self.gold


def score_examples(
    model: nn.Module,
    tokenizer: Any,
    examples: Sequence[Example],
    scoring: Scoring = "cloze",
    *,
    tokens_per_batch: int | None = None,
    truncate: bool = False,
    progress: bool = True,
) -> list[ItemResult]:
    """Score every choice of every example; the results are in the examples' order.

    The model runs in evaluation mode and without gradients, and is afterwards in the mode it was in. Batching
    and padding do not change the scores beyond rounding.

    Args:
        model: A causal language model of transformers, wrapped by PEFT or not.
        tokenizer: Its tokenizer.
        examples: Items with one right answer each.
        scoring: `"cloze"`: log-likelihood of each choice's text after the prompt, as lm-evaluation-harness
            computes it. `"letter"`: the prompt lists the options, and the logits after it are compared over
            the labels' last tokens.
        tokens_per_batch: Most tokens per batch; without it 4,096 on a CPU and 16,384 elsewhere.
        truncate: Cut the beginnings of prompts that do not fit the model's window, instead of refusing.
        progress: Show a progress bar with the time left.

    Raises:
        GraphLoraError: No examples, examples without choices, an unknown scoring, an encoder-decoder model,
            or an item that does not fit the window.
    """
    if scoring not in get_args(Scoring):
        raise GraphLoraError(f"unknown scoring {scoring!r}; choose one of {', '.join(get_args(Scoring))}")
    if not examples:
        raise GraphLoraError("there are no examples to score")
    for example in examples:
        if not isinstance(example, Example):
            raise GraphLoraError(
                f"item {example.id!r} has no choices; only multiple-choice data can be scored"
            )
    forward = Forward(model)
    todo = units(examples, tokenizer, scoring, forward.window, truncate)
    if tokens_per_batch is None:
        tokens_per_batch = TOKENS_PER_BATCH.get(forward.device.type, TOKENS_PER_BATCH_ACCELERATOR)
    scores: list[list[float]] = [[0.0] * len(example.choices) for example in examples]
    run: Callable[[Sequence[Unit]], list[list[float]]] = (
        forward.last_logits if scoring == "letter" else forward.score
    )
    with evaluating(model), tqdm(total=len(todo), desc=f"scoring ({scoring})", disable=not progress) as bar:
        for batch in batches(todo, tokens_per_batch, forward.pads):
            for position, values in zip(batch, run([todo[position] for position in batch]), strict=True):
                unit = todo[position]
                scores[unit.item][unit.first : unit.first + len(values)] = values
            bar.update(len(batch))
    return item_results(examples, todo, scores, scoring)


def summarize(results: Sequence[ItemResult]) -> dict[str, Any]:
    """Accuracy over all items, per domain and per kind.

    Returns:
        `n`, `acc`, `acc_stderr`, for cloze scoring also `acc_norm` and `acc_norm_stderr`, `truncated` (number
        of items), and the same under `domains` and `kinds` where the items have them. Standard errors are of
        the mean, `sqrt(p (1 - p) / (n - 1))`; `None` for one item.

    Raises:
        GraphLoraError: No results.
    """
    if not results:
        raise GraphLoraError("there are no results to summarize")
    summary = _accuracy(results)
    summary["truncated"] = sum(result.truncated for result in results)
    for name, key in (("domains", "domain"), ("kinds", "kind")):
        groups = sorted({getattr(result, key) for result in results} - {None})
        if groups:
            summary[name] = {
                group: _accuracy([result for result in results if getattr(result, key) == group])
                for group in groups
            }
    return summary


def write_items(results: Sequence[ItemResult], path: str | Path) -> Path:
    """Write one JSON line per item.

    Raises:
        GraphLoraError: The place cannot be written.
    """
    lines = (json.dumps(asdict(result), ensure_ascii=False) for result in results)
    return write_text(path, "".join(f"{line}\n" for line in lines))


def item_results(
    examples: Sequence[Example], todo: Sequence[Unit], scores: list[list[float]], scoring: Scoring
) -> list[ItemResult]:
    """Results of examples from their choices' scores and the units that were scored."""
    tokens = [0] * len(examples)
    truncated = [False] * len(examples)
    for unit in todo:
        tokens[unit.item] += len(unit.context)
        if scoring == "cloze":
            tokens[unit.item] += sum(len(part) for part in unit.continuations)
        truncated[unit.item] |= unit.truncated
    return [
        ItemResult(
            id=example.id,
            gold=example.gold,
            scores=tuple(scores[item]),
            prediction=_best(scores[item]),
            prediction_norm=_best(_per_character(example, scores[item])) if scoring == "cloze" else None,
            tokens=tokens[item],
            truncated=truncated[item],
            domain=example.domain,
            kind=example.kind,
        )
        for item, example in enumerate(examples)
    ]


def _per_character(example: Example, scores: Sequence[float]) -> list[float]:
    """Scores over the length of each choice's text, without the space before it."""
    return [
        score / max(1, len(choice.removeprefix(" ")))
        for choice, score in zip(example.choices, scores, strict=True)
    ]


def _best(scores: Sequence[float]) -> int:
    return max(range(len(scores)), key=lambda position: (scores[position], -position))


def _accuracy(results: Sequence[ItemResult]) -> dict[str, Any]:
    count = len(results)
    acc = sum(result.correct for result in results) / count
    summary: dict[str, Any] = {"n": count, "acc": acc, "acc_stderr": _stderr(acc, count)}
    norm = [result.correct_norm for result in results]
    if None not in norm:
        acc_norm = sum(map(bool, norm)) / count
        summary |= {"acc_norm": acc_norm, "acc_norm_stderr": _stderr(acc_norm, count)}
    return summary


def _stderr(accuracy: float, count: int) -> float | None:
    return math.sqrt(accuracy * (1 - accuracy) / (count - 1)) if count > 1 else None
