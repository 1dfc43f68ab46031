"""What the validations of a run measured, so that a resumed one compares like with like."""

from __future__ import annotations

import json
from collections.abc import Iterable
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

COMPARED_FILE = "compared.json"


@dataclass(frozen=True)
class Compared:
    """What makes the numbers of two validations comparable.

    Attributes:
        training: Hash of the rows to train on; `None` for a stream, which has its own.
        validation: Hash of the rows to validate on; `None` without validation.
        metric: What chooses the best checkpoint; `None` for nothing.
        since: Step from which on validations were of these rows.
    """

    training: str | None
    validation: str | None
    metric: str | None
    since: int = 0

    def write(self, checkpoint: Path) -> None:
        """Put it into a checkpoint that is being written."""
        (checkpoint / COMPARED_FILE).write_text(json.dumps(asdict(self)), encoding="utf-8")


def read_compared(checkpoint: Path) -> Compared | None:
    """What a checkpoint says of it; `None` for one of a release that did not write it down."""
    try:
        return Compared(**json.loads((checkpoint / COMPARED_FILE).read_text(encoding="utf-8")))
    except (OSError, ValueError, TypeError):
        return None


def best_validation(
    history: Iterable[dict[str, Any]], metric: str, greater: bool, checkpoints: Path | None, since: int
) -> tuple[int, float] | None:
    """The first best validation, its step and its value; `None` where there is none.

    Args:
        history: Logged values, as in `TrainerState.log_history`.
        metric: Name of what is compared, with or without `eval_`.
        greater: More is better.
        checkpoints: Folder in which its checkpoint must be; `None` where none is needed.
        since: Step before which validations do not count.
    """
    key = metric if metric.startswith("eval_") else f"eval_{metric}"
    best: tuple[int, float] | None = None
    for entry in history:
        step, value = entry.get("step", 0), entry.get(key)
        if value is None or value != value or step < since:
            continue
        if checkpoints is not None and not (checkpoints / f"checkpoint-{step}").is_dir():
            continue
        if best is None or (value > best[1] if greater else value < best[1]):
            best = step, value
    return best
