"""WinoGrande: which of two names fills the gap, scored by the text after the gap (partial evaluation).

The labels of the published test split are not public: the published validation split is the test set, and a
tenth of train is held out for validation.
"""

from __future__ import annotations

from typing import Any

from graphlora.tasks.example import Example, continuations, letters, listed
from graphlora.tasks.task import Task


def to_example(row: dict[str, Any], position: int) -> Example:
    """Example of one row: each option's context is the text up to the gap with the option put in."""
    names = (row["option1"], row["option2"])
    gap = row["sentence"].index("_")
    before, after = row["sentence"][:gap], row["sentence"][gap + 1 :].strip()
    return Example(
        id=f"winogrande-{position}",
        prompt=before.rstrip(),
        prompts=tuple(before + name for name in names),
        choices=continuations((after, after)),
        gold=int(row["answer"]) - 1,
        letter_prompt=listed(row["sentence"], names),
        labels=letters(2),
    )


WINOGRANDE = Task(
    "winogrande",
    to_example,
    hub_id="allenai/winogrande",
    hub_config="winogrande_xl",
    revision="01e74176c63542e6b0bcb004dcdea22d94fb67b5",
    sources={"train": "train", "validation": "train", "test": "validation"},
)
