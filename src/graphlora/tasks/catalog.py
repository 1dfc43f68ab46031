"""All tasks by name, and the one way from a name, a file or a hub id to examples."""

from __future__ import annotations

from pathlib import Path

from graphlora.errors import GraphLoraError
from graphlora.tasks.arc import ARC_CHALLENGE, ARC_EASY
from graphlora.tasks.boolq import BOOLQ, BOOLQ_NO_PASSAGE
from graphlora.tasks.custom import HUB_PREFIX, load_custom
from graphlora.tasks.example import Example, TextExample
from graphlora.tasks.hellaswag import HELLASWAG
from graphlora.tasks.openbookqa import OPENBOOKQA
from graphlora.tasks.piqa import PIQA
from graphlora.tasks.quiz import QUIZ
from graphlora.tasks.rows import SUFFIXES
from graphlora.tasks.shapes import CHOICE_COLUMNS
from graphlora.tasks.social_iqa import SOCIAL_IQA
from graphlora.tasks.task import Task
from graphlora.tasks.winogrande import WINOGRANDE

TASKS: dict[str, Task] = {
    task.name: task
    for task in (
        ARC_CHALLENGE,
        ARC_EASY,
        BOOLQ,
        BOOLQ_NO_PASSAGE,
        OPENBOOKQA,
        SOCIAL_IQA,
        PIQA,
        WINOGRANDE,
        HELLASWAG,
        QUIZ,
    )
}
ALIASES = {"siqa": "social_iqa"}


def find_task(spec: str) -> Task | None:
    """The task of a name or of a second name for it; `None` for anything else."""
    return TASKS.get(ALIASES.get(spec, spec))


def is_data(spec: str) -> bool:
    """Whether `spec` is meant as the user's data: a file, a folder or a hub data set."""
    return spec.startswith(HUB_PREFIX) or spec.endswith(SUFFIXES) or Path(spec).exists()


def check_known(spec: str) -> None:
    """Raise `GraphLoraError` for what is neither a task's name nor meant as the user's data."""
    if find_task(spec) is None and not is_data(spec):
        raise GraphLoraError(
            f"unknown task {spec!r}; choose one of {', '.join(TASKS)}, a data file ({', '.join(SUFFIXES)}) or a "
            f"folder of them, or {HUB_PREFIX}owner/name"
        )


def load_examples(
    spec: str, split: str, *, data_dir: str | Path | None = None, limit: int | None = None, seed: int = 0
) -> list[Example] | list[TextExample]:
    """Examples of one split of a task, a file, a folder or a hub data set.

    Args:
        spec: A name in `TASKS`, a data file or folder, or `hub:owner/name[:config]`.
        split: `"train"`, `"validation"` or `"test"`; for the user's own data also `"all"`.
        data_dir: Folder with the named tasks' files, `<task>/<split>.jsonl[.gz]`; without it, the hub.
        limit: Keep this many rows, chosen by `seed`.
        seed: Seed of that choice.

    Raises:
        GraphLoraError: Unknown task, missing file, or a row that does not fit; names file and line.
    """
    task = find_task(spec)
    if task is not None:
        return task.load(split, data_dir=data_dir, limit=limit, seed=seed)
    check_known(spec)
    return load_custom(spec, split, limit=limit, seed=seed)


def load_choices(
    spec: str, split: str, *, data_dir: str | Path | None = None, limit: int | None = None, seed: int = 0
) -> list[Example]:
    """Examples of data to score, which must be multiple choice; see `load_examples`.

    Raises:
        GraphLoraError: Also for data without choices; names it and the columns that are needed.
    """
    examples = load_examples(spec, split, data_dir=data_dir, limit=limit, seed=seed)
    items = [example for example in examples if isinstance(example, Example)]
    if len(items) < len(examples):
        raise GraphLoraError(
            f"{spec} has no choices; only multiple-choice data can be scored: give rows with {CHOICE_COLUMNS}"
        )
    return items
