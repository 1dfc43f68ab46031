"""Social IQa: what people do, want and feel.

No labelled test split is public: the published validation split is the test set, and a tenth of train is held
out for validation.
"""

from __future__ import annotations

from typing import Any

from graphlora.tasks.example import Example, continuations, letters, listed
from graphlora.tasks.task import Task


def to_example(row: dict[str, Any], position: int) -> Example:
    """Example of one row."""
    texts = (row["answerA"], row["answerB"], row["answerC"])
    question = f"{row['context']} {row['question']}"
    return Example(
        id=f"social_iqa-{position}",
        prompt=f"Q: {question}\nA:",
        choices=continuations(texts),
        gold=int(row["label"]) - 1,
        letter_prompt=listed(question, texts),
        labels=letters(3),
    )


SOCIAL_IQA = Task(
    "social_iqa",
    to_example,
    hub_id="lighteval/siqa",
    revision="54c6a1f8cb6daf4f5abf24a601852612fb35eb25",
    sources={"train": "train", "validation": "train", "test": "validation"},
)
