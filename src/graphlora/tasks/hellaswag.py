"""HellaSwag: which sentence comes next.

The labels of the published test split are not public: the published validation split is the test set, and a
tenth of train is held out for validation.
"""

from __future__ import annotations

import re
from typing import Any

from graphlora.tasks.example import Example, continuations, letters, listed
from graphlora.tasks.task import Task


def clean(text: str) -> str:
    """The text without the marks of the WikiHow pages: `[title]` ends a sentence, other brackets go."""
    text = text.strip().replace(" [title]", ". ")
    return re.sub(r"\[.*?\]", "", text).replace("  ", " ")


def to_example(row: dict[str, Any], position: int) -> Example:
    """Example of one row."""
    context = clean(f"{row['activity_label']}: {row['ctx_a']} {row['ctx_b'].capitalize()}")
    texts = tuple(clean(ending) for ending in row["endings"])
    return Example(
        id=f"hellaswag-{row['ind']}",
        prompt=context,
        choices=continuations(texts),
        gold=int(row["label"]),
        letter_prompt=listed(context, texts),
        labels=letters(len(texts)),
    )


HELLASWAG = Task(
    "hellaswag",
    to_example,
    hub_id="Rowan/hellaswag",
    revision="218ec52e09a7e7462a5400043bb9a69a41d06b76",
    sources={"train": "train", "validation": "train", "test": "validation"},
)
