"""ARC-Easy and ARC-Challenge: grade-school science questions."""

from __future__ import annotations

from typing import Any

from graphlora.tasks.example import Example, answer_position, continuations, letters, listed
from graphlora.tasks.task import Task

REVISION = "210d026faf9955653af8916fad021475a3f00453"


def to_example(row: dict[str, Any], position: int) -> Example:
    """Example of one row; a few rows have 3 or 5 choices, or the labels "1" to "4"."""
    texts = row["choices"]["text"]
    return Example(
        id=str(row["id"]),
        prompt=f"Question: {row['question']}\nAnswer:",
        choices=continuations(texts),
        gold=answer_position(row["answerKey"], row["choices"]["label"]),
        letter_prompt=listed(row["question"], texts, one_line=True),
        labels=letters(len(texts)),
    )


ARC_EASY = Task("arc_easy", to_example, "allenai/ai2_arc", "ARC-Easy", REVISION)
ARC_CHALLENGE = Task("arc_challenge", to_example, "allenai/ai2_arc", "ARC-Challenge", REVISION)
