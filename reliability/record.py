"""One JSON file per promise: what was promised, how it was tested, and what came out. Imports no torch."""

from __future__ import annotations

import json
import os
import shlex
import subprocess
import sys
from datetime import date
from pathlib import Path
from typing import Any

from graphlora.errors import GraphLoraError
from graphlora.records import write_text

ROOT = Path(__file__).resolve().parent.parent
RESULTS = ROOT / "results" / "reliability"
TEXTS = ("promise", "test", "figure", "command", "commit", "date", "machine")


def write_record(
    name: str,
    promise: str,
    test: str,
    figure: str,
    values: dict[str, object],
    *,
    machine: str | None = None,
    folder: Path | None = None,
) -> Path:
    """Writes what was measured of a promise, with the command, the commit, the day and the machine.

    Args:
        name: Name of the record, as in `reliability.promises`; the file is `NAME.json`.
        promise: One sentence that a user understands.
        test: The test that holds the promise in CI (`path::name`), or the command that does.
        figure: What was found, in a line: `"50 kills, 50 resumed, 0 weights differ"`.
        values: The numbers behind it, as JSON values.
        machine: Where it ran; left out: the number of CPU cores.
        folder: Where the file goes; left out: `results/reliability`.

    Raises:
        GraphLoraError: The place cannot be written.
    """
    values_of_record = {
        "promise": promise,
        "test": test,
        "figure": figure,
        "values": values,
        "command": _command(),
        "commit": _commit(),
        "date": date.today().isoformat(),
        "machine": machine or f"{os.cpu_count()} CPU cores",
    }
    path = (folder or RESULTS) / f"{name}.json"
    return write_text(path, json.dumps(values_of_record, indent=2, ensure_ascii=False) + "\n")


def read_records(folder: Path | None = None) -> dict[str, dict[str, Any]]:
    """The records of a folder by name.

    Raises:
        GraphLoraError: A file that is not such a record; the message names it and what is wrong.
    """
    return {path.stem: _read(path) for path in sorted((folder or RESULTS).glob("*.json"))}


def _read(path: Path) -> dict[str, Any]:
    try:
        record = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise GraphLoraError(f"cannot read the record {path}: {error}; measure it again") from error
    if not isinstance(record, dict):
        raise GraphLoraError(f"{path} holds no record; measure it again")
    for key in TEXTS:
        if not (isinstance(record.get(key), str) and record[key].strip()):
            raise GraphLoraError(f"{path}: {key} is {record.get(key)!r}; expected a text. Measure it again")
    if not isinstance(record.get("values"), dict):
        raise GraphLoraError(f"{path}: values is no mapping; measure it again")
    return record


def _command() -> str:
    """The command of this process, without the machine's paths."""
    spec = getattr(sys.modules.get("__main__"), "__spec__", None)
    if spec is not None:
        return shlex.join(["python", "-m", spec.name.removesuffix(".__main__"), *sys.argv[1:]])
    return shlex.join(["python", os.path.relpath(sys.argv[0], ROOT), *sys.argv[1:]])


def _commit() -> str:
    """The short commit of the source, with a mark where tracked files differ from it; `"unknown"` outside git."""
    try:
        commit, changes = (
            subprocess.run(
                ["git", "-C", str(ROOT), *words], capture_output=True, text=True, timeout=20, check=True
            ).stdout.strip()
            for words in (
                ("rev-parse", "--short", "HEAD"),
                ("status", "--porcelain", "--untracked-files=no", "--", ":!results", ":!docs"),
            )
        )
    except (OSError, subprocess.SubprocessError):
        return "unknown"
    return commit + ("-dirty" if changes else "")
