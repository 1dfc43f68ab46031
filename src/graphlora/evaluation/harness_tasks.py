"""Tasks in the form of EleutherAI's lm-evaluation-harness: our rows as local files, or the harness's own tasks.

Where the harness defines a task that is also ours, its own definition makes prompts and choices of the rows, and only
the data is replaced; so an equal result says that both sides agree on the text too. All other multiple-choice data
gets a definition of its own.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from difflib import get_close_matches
from importlib.resources import files
from importlib.util import find_spec
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import datasets
import yaml

from graphlora.errors import GraphLoraError
from graphlora.tasks.catalog import find_task, is_data, load_choices
from graphlora.tasks.example import Example
from graphlora.tasks.rows import hub_errors

INSTALL = "pip install 'graphlora[harness]'"
ACC, ACC_NORM = (
    {"metric": name, "aggregation": "mean", "higher_is_better": True} for name in ("acc", "acc_norm")
)


@dataclass(frozen=True)
class Definition:
    """The harness's definition of a task, and what it reads of a row.

    Attributes:
        path: The definition's file, below the harness's folder of tasks.
        columns: Columns that are taken from our row as they are.
        gold: Column for the position of the right answer, where the definition wants a number.
        first: Number of the first choice in that column.
        as_text: Whether the column holds the number as text.
        metrics: Metrics. The harness would divide WinoGrande's likelihoods by the lengths of the contexts.
    """

    path: str
    columns: tuple[str, ...]
    gold: str | None = None
    first: int = 0
    as_text: bool = False
    metrics: tuple[dict[str, Any], ...] = (ACC, ACC_NORM)

    def row(self, values: dict[str, Any], example: Example) -> dict[str, Any]:
        """The row that the definition reads."""
        row = {name: values[name] for name in self.columns}
        if self.gold is not None:
            number = example.gold + self.first
            row[self.gold] = str(number) if self.as_text else number
        return row


ARC = ("question", "choices", "answerKey")
DEFINITIONS = {
    "arc_easy": Definition("arc/arc_easy.yaml", ARC),
    "arc_challenge": Definition("arc/arc_challenge.yaml", ARC),
    "boolq": Definition("super_glue/boolq/default.yaml", ("passage", "question"), "label"),
    "openbookqa": Definition("openbookqa/openbookqa.yaml", ("question_stem", "choices", "answerKey")),
    "social_iqa": Definition(
        "siqa/siqa.yaml", ("context", "question", "answerA", "answerB", "answerC"), "label", 1, as_text=True
    ),
    "piqa": Definition("piqa/piqa.yaml", ("goal", "sol1", "sol2"), "label"),
    "winogrande": Definition(
        "winogrande/default.yaml", ("sentence", "option1", "option2"), "answer", 1, True, metrics=(ACC,)
    ),
    "hellaswag": Definition(
        "hellaswag/hellaswag.yaml", ("activity_label", "ctx_a", "ctx_b", "endings"), "label", as_text=True
    ),
}
OWN_DEFINITION = {
    "output_type": "multiple_choice",
    "doc_to_text": "prompt",
    "doc_to_choice": "choices",
    "doc_to_target": "gold",
    "target_delimiter": " ",
    "metadata": {"version": 1.0},
}


@dataclass(frozen=True)
class HarnessTask:
    """A task, group or tag of the harness under the name that the user gave.

    Attributes:
        name: The user's name.
        loaded: The harness's tasks and groups with their data, as its `TaskManager.load` returns them.
        examples: Our form of the items, in the harness's order; `None` for the harness's own data.
    """

    name: str
    loaded: dict[str, Any]
    examples: tuple[Example, ...] | None = None


def require_harness() -> None:
    """Raise `GraphLoraError` with the command that installs the harness where it is missing."""
    if find_spec("lm_eval") is None:
        raise GraphLoraError(
            f"--harness lm-eval needs lm-evaluation-harness, which is not installed; {INSTALL}"
        )


def load_harness_tasks(
    specs: Sequence[str],
    split: str,
    *,
    data_dir: str | Path | None = None,
    limit: int | None = None,
    seed: int = 0,
) -> list[HarnessTask]:
    """Tasks with their data, ready for the harness.

    Args:
        specs: Our task names, data files or hub data sets, as for `load_examples`; any other name is one of the
            harness's own tasks, groups or tags, whose split, data and number of shots are the harness's.
        split: Split of our tasks.
        data_dir: Folder with our tasks' files in the hub's schema; without it, the hub.
        limit: Rows per task of ours, chosen by `seed`.
        seed: Seed of that choice.

    Raises:
        GraphLoraError: The harness is not installed or does not know a task, or data is missing or does not fit.
    """
    require_harness()
    local = {
        spec: _local_task(spec, split, data_dir, limit, seed)
        for spec in specs
        if find_task(spec) is not None or is_data(spec)
    }
    others = [spec for spec in specs if spec not in local]
    own = dict(zip(others, _harness_tasks(others), strict=True)) if others else {}
    return [(local | own)[spec] for spec in specs]


def _local_task(
    spec: str, split: str, data_dir: str | Path | None, limit: int | None, seed: int
) -> HarnessTask:
    task = find_task(spec)
    definition = DEFINITIONS.get(task.name) if task is not None else None
    if task is not None and definition is not None:
        pairs = task.load_rows(split, data_dir, limit, seed)
        examples = [example for _, example in pairs]
        rows = [definition.row(row.values, example) for row, example in pairs]
        content = {
            "include": str(_definition_file(task.name, definition)),
            "metric_list": list(definition.metrics),
        }
    else:
        examples = load_choices(spec, split, data_dir=data_dir, limit=limit, seed=seed)
        rows = [_own_row(example) for example in examples]
        content = OWN_DEFINITION | {"metric_list": [ACC, ACC_NORM]}
    try:
        data = datasets.Dataset.from_list(rows)
    except (ValueError, TypeError) as error:
        raise GraphLoraError(f"rows of {spec} have columns of mixed types: {error}") from error
    return HarnessTask(spec, _load(f"graphlora:{spec}", content, data), tuple(examples))


def _load(name: str, content: dict[str, Any], data: datasets.Dataset) -> dict[str, Any]:
    """The harness's task for a definition and rows, through files that are gone afterwards.

    The rows travel as Parquet: its types are explicit, while a JSON reader takes texts that look like dates for dates.
    """
    from lm_eval.tasks import TaskManager  # pyright: ignore[reportMissingImports]  # an extra

    with TemporaryDirectory(prefix="graphlora-", ignore_cleanup_errors=True) as place, _no_bars():
        rows, definition = Path(place, "test.parquet"), Path(place, "task.yaml")
        data.to_parquet(rows)
        content = content | {
            "task": name,
            "dataset_path": "parquet",
            "dataset_name": None,
            "dataset_kwargs": {
                "data_files": {"test": str(rows)},
                "cache_dir": str(Path(place, "cache")),
                "keep_in_memory": True,
            },
            "training_split": None,
            "validation_split": None,
            "test_split": "test",
            "num_fewshot": 0,
        }
        definition.write_text(yaml.safe_dump(content, allow_unicode=True), encoding="utf-8")
        manager: Any = TaskManager(include_defaults=False)
        return manager.load(str(definition))


def _definition_file(name: str, definition: Definition) -> Path:
    path = Path(str(files("lm_eval"))) / "tasks" / definition.path
    if not path.is_file():
        raise GraphLoraError(
            f"this lm-evaluation-harness has no {definition.path} for task {name!r}; {INSTALL} gives one that has it"
        )
    return path


def _own_row(example: Example) -> dict[str, Any]:
    """Row for our own definition, which puts a space before each choice, as the examples do."""
    return {
        "prompt": example.prompt,
        "choices": [choice.removeprefix(" ") for choice in example.choices],
        "gold": example.gold,
    }


def _harness_tasks(names: Sequence[str]) -> list[HarnessTask]:
    """The harness's own tasks; its list of them takes seconds to read."""
    from lm_eval.tasks import TaskManager  # pyright: ignore[reportMissingImports]  # an extra

    manager: Any = TaskManager()
    for name in names:
        if name not in manager.all_tasks:
            near = get_close_matches(name, manager.all_tasks, n=3)
            hint = f"did you mean {', '.join(near)}?" if near else "lm-eval ls tasks lists the harness's"
            raise GraphLoraError(f"unknown task {name!r}, to graphlora and to lm-evaluation-harness; {hint}")
    tasks = []
    for name in names:
        with hub_errors(f"the data of lm-evaluation-harness's task {name!r}"):
            tasks.append(HarnessTask(name, manager.load(name)))
    return tasks


@contextmanager
def _no_bars() -> Iterator[None]:
    """No progress bars of `datasets` for files that are read in no time."""
    shown = not datasets.are_progress_bars_disabled()
    datasets.disable_progress_bars()
    try:
        yield
    finally:
        if shown:
            datasets.enable_progress_bars()
