"""BoolQ: yes-no questions, with the passage that answers them or without.

The labels of the published test split are not public: 20% of the published validation split, chosen with seed
42, is validation here, and the rest is test.
"""

from __future__ import annotations

from typing import Any

from graphlora.errors import GraphLoraError
from graphlora.tasks.example import Example
from graphlora.tasks.task import Task


def to_example(row: dict[str, Any], position: int, passage: bool = True) -> Example:
    """Example of one row: cloze answers "no" and "yes", letter answers "false" and "true"."""
    if not isinstance(row["answer"], bool):
        raise GraphLoraError(f"answer {row['answer']!r} is neither true nor false")
    text = f"{row['passage']}\n" if passage else ""
    instruction = "Please answer the following question with true or false"
    return Example(
        id=f"boolq-{position}",
        prompt=f"{text}Question: {row['question']}?\nAnswer:",
        choices=(" no", " yes"),
        gold=int(row["answer"]),
        letter_prompt=f"{text}{instruction}: {row['question']}?\nAnswer:",
        labels=(" false", " true"),
    )


def without_passage(row: dict[str, Any], position: int) -> Example:
    """Example of one row, question alone."""
    return to_example(row, position, passage=False)


HUB: dict[str, Any] = {
    "hub_id": "google/boolq",
    "revision": "35b264d03638db9f4ce671b711558bf7ff0f80d5",
    "folder": "boolq",
    "sources": {"train": "train", "validation": "validation", "test": "validation"},
    "validation_share": 0.2,
}
BOOLQ = Task("boolq", to_example, **HUB)
BOOLQ_NO_PASSAGE = Task("boolq_no_passage", without_passage, **HUB)
