"""The user's own data: files, folders and hub data sets in three shapes, recognized by their columns.

Prompt and completion; chat `messages`; multiple choice: `question`, `choices` and `answer`.
"""

from __future__ import annotations

import hashlib
import json
import math
from pathlib import Path

from graphlora.errors import GraphLoraError
from graphlora.tasks.example import Example, TextExample
from graphlora.tasks.rows import Row, find_split, hub_splits, read_hub, read_rows
from graphlora.tasks.shapes import read_shape
from graphlora.tasks.task import SPLITS, subset

HUB_PREFIX = "hub:"
ALL = "all"
VALIDATION_SHARE = 0.1
SPLIT_NAMES = {"train": "train", "test": "test", "validation": "validation", "valid": "validation"} | {
    "val": "validation",
    "dev": "validation",
}


def load_custom(
    spec: str, split: str, *, limit: int | None = None, seed: int = 0
) -> list[Example] | list[TextExample]:
    """Examples of one split of the user's data.

    Where the data has no validation split, validation is a tenth of train, chosen by a hash of each row's
    content, so that it does not move when rows are added, and equal rows stay together; train is the rest.
    A single file is train, unless it has a column `split`.

    Args:
        spec: A file, a folder with `train`, `validation` and `test` files, or `hub:owner/name[:config]`.
        split: `"train"`, `"validation"`, `"test"`, or `"all"` for every row.
        limit: Keep this many rows, chosen by `seed`.
        seed: Seed of that choice.

    Raises:
        GraphLoraError: The data is missing, empty, broken or has other columns; names file and line.
    """
    if split not in (*SPLITS, ALL):
        raise GraphLoraError(f"unknown split {split!r}; choose one of {', '.join((*SPLITS, ALL))}")
    rows = subset(_select(spec, split), limit, seed)
    return read_shape(rows)


def _select(spec: str, split: str) -> list[Row]:
    parts = _parts(spec, split)
    if split == ALL:
        rows = [row for name in SPLITS for row in parts.get(name, [])]
    elif "validation" in parts or split == "test":
        rows = parts.get(split, [])
    else:
        train = parts.get("train", [])
        held_out = _held_out(train)
        rows = [row for row in train if (digest(row) in held_out) == (split == "validation")]
    if not rows:
        found = ", ".join(f"{name} ({len(part)} rows)" for name, part in parts.items() if part)
        raise GraphLoraError(
            f"{spec} has no rows for split {split!r}; found {found or 'nothing'}; add a file or a split "
            f"column for it, or use split {ALL!r} for every row"
        )
    return rows


def _parts(spec: str, split: str) -> dict[str, list[Row]]:
    """The published splits that `split` can be made of; rows of a split that is not needed are not read."""
    if spec.startswith(HUB_PREFIX):
        hub_id, _, config = spec.removeprefix(HUB_PREFIX).partition(":")
        names = {
            SPLIT_NAMES[name]: name for name in hub_splits(hub_id, config or None) if name in SPLIT_NAMES
        }
        return {
            name: read_hub(hub_id, config or None, source) if _needed(name, split, set(names)) else []
            for name, source in names.items()
        }
    path = Path(spec)
    if path.is_dir():
        files = {name: file for name in SPLITS if (file := find_split(path, name)) is not None}
        if not files:
            raise GraphLoraError(
                f"{path} has no train, validation or test file (.jsonl, .json, .csv or .parquet)"
            )
        return {
            name: read_rows(file) if _needed(name, split, set(files)) else [] for name, file in files.items()
        }
    return _by_column(read_rows(path))


def _needed(name: str, split: str, names: set[str]) -> bool:
    return split == ALL or name == split or (name == "train" and "validation" not in names)


def _by_column(rows: list[Row]) -> dict[str, list[Row]]:
    if "split" not in rows[0].values:
        return {"train": rows}
    parts: dict[str, list[Row]] = {}
    for row in rows:
        name = SPLIT_NAMES.get(str(row.values.get("split")))
        if name is None:
            raise GraphLoraError(
                f"{row.where}: split {row.values.get('split')!r} is unknown; use {', '.join(SPLITS)}"
            )
        parts.setdefault(name, []).append(row)
    return parts


def _held_out(rows: list[Row]) -> set[str]:
    digests = sorted({digest(row) for row in rows})
    return set(digests[: math.ceil(VALIDATION_SHARE * len(digests))])


def digest(row: Row) -> str:
    """Hash of a row's content, without its `id` and `split`."""
    values = {name: value for name, value in row.values.items() if name not in ("id", "split")}
    text = json.dumps(values, sort_keys=True, ensure_ascii=False, default=str)
    return hashlib.sha256(text.encode()).hexdigest()
