"""Inputs for data files: JSONL, JSON and CSV in the users' three shapes and in the tasks' own schemas."""

from __future__ import annotations

import csv
import gzip
import io
import json
from pathlib import Path
from random import Random
from typing import Any

from graphlora.tasks.catalog import TASKS
from graphlora.tasks.custom import load_custom
from graphlora.tasks.rows import read_rows
from reliability.fuzz.mutate import mutate, mutate_bytes, mutate_text
from reliability.fuzz.reader import Input, Reader

Rows = list[dict[str, Any]]
OWN: tuple[Rows, ...] = (
    [
        {"prompt": f"Say {i}", "completion": f"{i}", "domain": "d", "split": s}
        for i, s in enumerate(("train", "test", "val"))
    ],
    [
        {"messages": [{"role": "user", "content": "hi"}, {"role": "assistant", "content": f"{i}"}], "id": i}
        for i in range(3)
    ],
    [
        {"question": f"q{i}", "choices": ["one", "two", "three"], "answer": a}
        for i, a in enumerate(("B", 1, "one"))
    ],
    [
        {"question": "q", "A": "x", "B": "y", "answer": "A"},
        {"question": "r", "A": "x", "B": "y", "answer": "y"},
    ],
    [
        {"question": "q", "choices": {"text": ["x", "y"], "label": ["1", "2"]}, "answerKey": "2"}
        for _ in range(2)
    ],
    [{"question": "q", "choice1": "x", "choice2": "y", "label": "0"}],
)
TASK_ROWS: dict[str, Rows] = {
    "arc_easy": [
        {"id": "a", "question": "q", "choices": {"text": ["x", "y"], "label": ["A", "B"]}, "answerKey": "B"}
    ],
    "boolq": [{"question": "is it", "passage": "it is", "answer": True}],
    "hellaswag": [
        {
            "ind": 1,
            "activity_label": "a",
            "ctx_a": "b",
            "ctx_b": "c",
            "ctx": "b c",
            "endings": ["d", "e", "f", "g"],
            "label": "2",
            "source_id": "s",
            "split": "val",
            "split_type": "indomain",
        }
    ],
    "openbookqa": [
        {
            "id": "a",
            "question_stem": "q",
            "choices": {"text": ["x", "y"], "label": ["A", "B"]},
            "answerKey": "B",
        }
    ],
    "piqa": [{"goal": "g", "sol1": "a", "sol2": "b", "label": 1}],
    "social_iqa": [
        {"context": "c", "question": "q", "answerA": "a", "answerB": "b", "answerC": "c", "label": "2"}
    ],
    "winogrande": [{"sentence": "The _ is here", "option1": "a", "option2": "b", "answer": "1"}],
}
WORDS: tuple[Any, ...] = (
    "prompt",
    "completion",
    "messages",
    "question",
    "choices",
    "answer",
    "answerKey",
    "label",
    "split",
    "domain",
    "id",
    "A",
    "B",
    "role",
    "content",
    "assistant",
    "user",
    "text",
    "train",
    "validation",
    "0",
    "1",
    "A",
    0,
    1,
    2,
    -1,
    True,
    "[1",
    '["a", "b"]',
    '{"text": ["a"], "label": ["b"]}',
    "٣",
    "9" * 4400,
    {"role": "assistant", "content": "x"},
    ["a", "b"],
    ["a"] * 30,
)
NAMES = ("rows.jsonl", "rows.csv", "rows.json", "rows.jsonl.gz")


def data_input(rng: Random) -> Input:
    """A data file, changed."""
    if rng.random() < 0.3:
        name = rng.choice(list(TASK_ROWS))
        rows = mutate(TASK_ROWS[name] * rng.choice((1, 3)), rng, WORDS)
        content = _lines(rows)
        files = {f"tasks/{name}/{split}.jsonl": content for split in ("train", "validation", "test")}
        return files
    rows = mutate(rng.choice(OWN), rng, WORDS)
    kind = rng.choice((".jsonl", ".jsonl", ".csv", ".json", ".jsonl.gz"))
    content = _csv(rows, rng) if kind == ".csv" else _json(rows) if kind == ".json" else _lines(rows)
    if rng.random() < 0.08:
        content = mutate_text(content.decode("utf-8", "replace"), rng).encode("utf-8", "surrogatepass")
    if rng.random() < 0.08:
        content = mutate_bytes(content, rng)
    if kind == ".jsonl.gz":
        content = gzip.compress(content, 1)
        content = mutate_bytes(content, rng) if rng.random() < 0.1 else content
    return {f"rows{kind}": content}


def _json(value: Any) -> bytes:
    try:
        return json.dumps(value, ensure_ascii=False).encode("utf-8", "surrogatepass")
    except (ValueError, RecursionError):
        return b'{"a": ' + b"1" * 5000 + b"}"


def _lines(rows: Any) -> bytes:
    return b"\n".join(_json(row) for row in rows) if isinstance(rows, list) else _json(rows)


def _csv(rows: Any, rng: Random) -> bytes:
    rows = [row for row in rows if isinstance(row, dict)] if isinstance(rows, list) else []
    text = io.StringIO(newline="")
    columns = list(dict.fromkeys(str(key) for row in rows for key in row))
    writer = csv.writer(text, lineterminator=rng.choice(("\n", "\r\n")))
    writer.writerow(columns)
    for row in rows:
        cells = [row.get(column, "") for column in columns]
        writer.writerow(
            [
                _json(cell).decode("utf-8", "replace") if isinstance(cell, (list, dict)) else _plain(cell)
                for cell in cells
            ]
        )
    return text.getvalue().encode("utf-8", "surrogatepass")


def _plain(value: Any) -> str:
    try:
        return str(value)
    except ValueError:
        return "1" * 4400


def _parse(folder: Path) -> Path:
    path = next((path for name in NAMES if (path := folder / name).is_file()), None)
    if path is None:
        path = next(folder.glob("tasks/*/train.jsonl"))
    read_rows(path)
    return path


def _validate(path: Path) -> None:
    if "tasks" in path.parts:
        examples: Any = TASKS[path.parent.name].load("train", data_dir=path.parents[1])
    else:
        examples = [item for split in ("train", "all") for item in load_custom(str(path), split)]
    for example in examples:
        repr(example).encode("utf-8")


DATA = Reader(
    name="data",
    title="data files (JSONL, JSON, CSV)",
    generate=data_input,
    parse=_parse,
    validate=_validate,
    modules=("tasks/rows.py", "tasks/shapes.py", "tasks/example.py", "tasks/custom.py", "tasks/task.py"),
    excluded=(
        "read_hub",
        "hub_splits",
        "hub_errors",
        "_parquet",
        "find_split",
        "Example.context",
        "_needed",
        "holdout",
        "subset",
        "_parts",
    ),
)
