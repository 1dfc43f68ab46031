"""From examples to token ids: which are context, which are scored, and what fits the model's window."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Literal

from graphlora.errors import GraphLoraError
from graphlora.tasks.example import Example

Scoring = Literal["cloze", "letter"]


@dataclass(frozen=True)
class Unit:
    """One context and the continuations to score after it.

    Attributes:
        item: Position of the example.
        first: Position of the first continuation among the example's choices.
        context: Token ids of the context, at least one.
        continuations: Token ids of each continuation, at least one each.
        truncated: Whether the context lost tokens on the left to fit the window.
    """

    item: int
    first: int
    context: tuple[int, ...]
    continuations: tuple[tuple[int, ...], ...]
    truncated: bool = False

    @property
    def longest(self) -> int:
        """Tokens that the model reads for the longest continuation, whose last token it only predicts."""
        return len(self.context) + max(len(part) for part in self.continuations) - 1


def encode_pair(tokenizer: Any, context: str, continuation: str) -> tuple[list[int], list[int]]:
    """Token ids of a context and of its continuation.

    Spaces at the end of the context count as the continuation's. Both together are encoded as one text, and
    the continuation is what follows the context's own number of tokens. The tokenizer adds the special tokens
    that it adds by default, except for an end-of-text token, and for a begin-of-text token that the text has
    already. An empty context becomes the begin-of-text token (the end-of-text token where there is none).

    Args:
        tokenizer: A transformers tokenizer.
        context: Text that is given.
        continuation: Text that is scored or learned.

    Raises:
        GraphLoraError: An empty context, and the tokenizer has neither of the two tokens.
    """
    stripped = context.rstrip()
    continuation = context[len(stripped) :] + continuation
    if not stripped:
        start = tokenizer.bos_token_id if tokenizer.bos_token_id is not None else tokenizer.eos_token_id
        if start is None:
            raise GraphLoraError(
                "the prompt is empty and the tokenizer has no begin-of-text token; give it text"
            )
        return [start], tokenizer.encode(continuation, add_special_tokens=False)
    context_ids = _encode(tokenizer, stripped)
    return context_ids, _encode(tokenizer, stripped + continuation)[len(context_ids) :]


def units(
    examples: Sequence[Example], tokenizer: Any, scoring: Scoring, window: int | None, truncate: bool
) -> list[Unit]:
    """Units of all examples: one each where the choices share their context, else one per choice.

    Args:
        examples: Items to score.
        tokenizer: A transformers tokenizer.
        scoring: `"cloze"` scores the choices' texts, `"letter"` the last token of each label.
        window: Tokens that the model can read; `None` for no limit.
        truncate: Cut contexts on the left to fit the window, instead of refusing.

    Raises:
        GraphLoraError: An item does not fit the window, or has a choice without tokens; names the item.
    """
    if scoring == "letter":
        return [
            _letter_unit(item, example, tokenizer, window, truncate) for item, example in enumerate(examples)
        ]
    return [
        unit
        for item, example in enumerate(examples)
        for unit in _cloze_units(item, example, tokenizer, window, truncate)
    ]


def _cloze_units(
    item: int, example: Example, tokenizer: Any, window: int | None, truncate: bool
) -> list[Unit]:
    pairs = [
        encode_pair(tokenizer, example.context(position), choice)
        for position, choice in enumerate(example.choices)
    ]
    for position, (_, continuation) in enumerate(pairs):
        if not continuation:
            raise GraphLoraError(
                f"item {example.id!r}: choice {example.choices[position]!r} has no tokens after the prompt; "
                "give it text"
            )
    whole = Unit(item, 0, tuple(pairs[0][0]), tuple(tuple(continuation) for _, continuation in pairs))
    if all(context == pairs[0][0] for context, _ in pairs) and (window is None or whole.longest <= window):
        return [whole]
    alone = [Unit(item, position, tuple(a), (tuple(b),)) for position, (a, b) in enumerate(pairs)]
    return [_fitted(unit, example, window, truncate) for unit in alone]


def _letter_unit(item: int, example: Example, tokenizer: Any, window: int | None, truncate: bool) -> Unit:
    labels = [tokenizer.encode(label, add_special_tokens=False)[-1:] for label in example.labels]
    if len({tuple(label) for label in labels}) < len(labels) or not all(labels):
        raise GraphLoraError(
            f"item {example.id!r}: the tokenizer ends several of the labels {', '.join(example.labels)} in "
            "the same token; use scoring='cloze'"
        )
    context = _encode(tokenizer, example.letter_prompt)
    return _fitted(
        Unit(item, 0, tuple(context), tuple(tuple(label) for label in labels)), example, window, truncate
    )


def _fitted(unit: Unit, example: Example, window: int | None, truncate: bool) -> Unit:
    over = 0 if window is None else unit.longest - window
    if over <= 0:
        return unit
    if not truncate or over >= len(unit.context):
        raise GraphLoraError(
            f"item {example.id!r} has {unit.longest} tokens and the model's window is {window}; shorten "
            "it, leave it out, or set truncate to cut the beginnings of long prompts"
        )
    return Unit(unit.item, unit.first, unit.context[over:], unit.continuations, truncated=True)


def _encode(tokenizer: Any, text: str) -> list[int]:
    bos, eos = tokenizer.bos_token, tokenizer.eos_token
    ids = list(tokenizer.encode(text, add_special_tokens=not (bos and text.startswith(bos))))
    if len(ids) > 1 and ids[-1] == tokenizer.eos_token_id and not (eos and text.endswith(eos)):
        ids.pop()
    return ids
