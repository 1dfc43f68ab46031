"""OpenBookQA: elementary science questions; the sentence that the choices finish is the prompt."""

from __future__ import annotations

from typing import Any

from graphlora.tasks.example import Example, answer_position, continuations, letters, listed
from graphlora.tasks.task import Task


def to_example(row: dict[str, Any], position: int) -> Example:
    """Example of one row."""
    texts = row["choices"]["text"]
    return Example(
        id=str(row["id"]),
        prompt=row["question_stem"],
        choices=continuations(texts),
        gold=answer_position(row["answerKey"].strip(), row["choices"]["label"]),
        letter_prompt=listed(row["question_stem"], texts, one_line=True),
        labels=letters(len(texts)),
    )


OPENBOOKQA = Task(
    "openbookqa", to_example, "allenai/openbookqa", "main", "388097ea7776314e93a529163e0fea805b8a6454"
)
