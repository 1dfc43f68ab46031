"""What training and evaluation work on: multiple-choice items and free text, and how prompts list options."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from graphlora.errors import GraphLoraError

LETTERS = "ABCDEFGHIJKLMNOPQRSTUVWXYZ"


@dataclass(frozen=True)
class Example:
    r"""One multiple-choice item, ready for both scorings.

    Attributes:
        id: Identifier, unique within its split.
        prompt: Cloze prompt, without the answer: `"Question: ...\nAnswer:"`.
        choices: Cloze continuations, each with its leading space: `" Paris"`.
        gold: Position of the right answer in `choices`.
        letter_prompt: Prompt that lists the options, answered by a label.
        labels: Letter continuations, each with its leading space: `" A"`, `" B"`, ...
        domain: Subject area, for accuracy per domain.
        kind: Sort of item within a split, for accuracy per kind (the quiz: `"seen"` or `"unseen"`).
        prompts: One context per choice where the continuation is shared (WinoGrande); replaces `prompt`.
    """

    id: str
    prompt: str
    choices: tuple[str, ...]
    gold: int
    letter_prompt: str
    labels: tuple[str, ...]
    domain: str | None = None
    kind: str | None = None
    prompts: tuple[str, ...] | None = None

    def __post_init__(self) -> None:
        """Raise `GraphLoraError` where the parts do not fit together."""
        count = len(self.choices)
        if count < 2:
            raise GraphLoraError(f"item {self.id!r} has {count} choice(s); give at least 2")
        if not 0 <= self.gold < count:
            raise GraphLoraError(f"item {self.id!r}: answer {self.gold} is not among its {count} choices")
        if len(self.labels) != count or (self.prompts is not None and len(self.prompts) != count):
            raise GraphLoraError(
                f"item {self.id!r}: labels and prompts must be as many as its {count} choices"
            )

    def context(self, position: int) -> str:
        """The cloze context of the choice at `position`: `prompt`, or the choice's own of `prompts`."""
        return self.prompt if self.prompts is None else self.prompts[position]


@dataclass(frozen=True)
class TextExample:
    """Free text to train on: a prompt with its completion, or a chat.

    Attributes:
        id: Identifier, unique within its split.
        prompt: Text before the completion.
        completion: Text to learn.
        messages: Chat turns, each with `role` and `content`; the model's chat template renders them.
        domain: Subject area.
    """

    id: str
    prompt: str | None = None
    completion: str | None = None
    messages: tuple[dict[str, Any], ...] | None = None
    domain: str | None = None


def answer_position(answer: str, labels: Sequence[str]) -> int:
    """Position of the answer's label.

    Raises:
        GraphLoraError: The answer is not among the labels.
    """
    if answer not in labels:
        raise GraphLoraError(f"answer {answer!r} is not among the choices {', '.join(map(str, labels))}")
    return list(labels).index(answer)


def letters(count: int) -> tuple[str, ...]:
    """Labels " A", " B", ... of `count` options.

    Raises:
        GraphLoraError: More options than letters.
    """
    if count > len(LETTERS):
        raise GraphLoraError(f"{count} choices; at most {len(LETTERS)} can be lettered")
    return tuple(f" {letter}" for letter in LETTERS[:count])


def listed(question: str, texts: Sequence[str], one_line: bool = False) -> str:
    """Letter prompt that lists the options `(A) first (B) second` after the question.

    Args:
        question: The question, with its context if it has one.
        texts: The options.
        one_line: Put instruction, question and options on one line (ARC, OpenBookQA).
    """
    labels = letters(len(texts))
    options = " ".join(f"({label.strip()}) {text}" for label, text in zip(labels, texts, strict=True))
    if one_line:
        return f"Please choose the correct answer to the question: {question} {options}\nAnswer:"
    return f"Please choose the correct answer to the question.\nQuestion: {question}\n{options}\nAnswer:"


def continuations(texts: Sequence[str]) -> tuple[str, ...]:
    """Cloze continuations: each text after one space."""
    return tuple(f" {text}" for text in texts)
