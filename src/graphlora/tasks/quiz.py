"""The embedded quiz: short questions in six domains, packaged with the library (see `quiz_data/README.md`)."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from graphlora.tasks.example import Example, answer_position, continuations, letters, listed
from graphlora.tasks.task import Task


def to_example(row: dict[str, Any], position: int) -> Example:
    """Example of one row; `kind` is `"train"`, `"seen"` or `"unseen"`."""
    texts = row["choices"]["text"]
    return Example(
        id=str(row["id"]),
        prompt=f"Question: {row['question']}\nAnswer:",
        choices=continuations(texts),
        gold=answer_position(row["answerKey"], row["choices"]["label"]),
        letter_prompt=listed(row["question"], texts, one_line=True),
        labels=letters(len(texts)),
        domain=row["domain"],
        kind=row["kind"],
    )


QUIZ = Task("quiz", to_example, embedded=Path(__file__).parent / "quiz_data")
