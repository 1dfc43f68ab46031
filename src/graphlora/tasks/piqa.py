"""PIQA: which of two ways reaches a goal in the physical world.

The labels of the published test split are not public: the published validation split is the test set, and a
tenth of train is held out for validation.
"""

from __future__ import annotations

from typing import Any

from graphlora.tasks.example import Example, continuations, letters, listed
from graphlora.tasks.task import Task


def to_example(row: dict[str, Any], position: int) -> Example:
    """Example of one row."""
    texts = (row["sol1"], row["sol2"])
    return Example(
        id=f"piqa-{position}",
        prompt=f"Question: {row['goal']}\nAnswer:",
        choices=continuations(texts),
        gold=int(row["label"]),
        letter_prompt=listed(row["goal"], texts),
        labels=letters(2),
    )


PIQA = Task(
    "piqa",
    to_example,
    hub_id="baber/piqa",
    revision="142f6d7367fd9877f0fb3b5734ea6a545f54cdd1",
    sources={"train": "train", "validation": "train", "test": "validation"},
)
