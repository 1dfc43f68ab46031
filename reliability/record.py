"""One JSON file per promise of `docs/reliability.md`."""

from __future__ import annotations

import datetime
import json
import os
import shlex
import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
RESULTS = ROOT / "results" / "reliability"


def write_record(name: str, promise: str, test: str, figure: str, values: dict[str, object]) -> Path:
    """Write the record of a promise.

    Args:
        name: Name of the file, without its ending.
        promise: One sentence that a user understands.
        test: The test that holds it, `path::test`, or a command.
        figure: The result in a few words.
        values: The numbers behind it.

    Returns:
        The file.
    """
    commit = subprocess.run(
        ["git", "rev-parse", "--short", "HEAD"], cwd=ROOT, capture_output=True, text=True, check=True
    ).stdout.strip()
    module = sys.argv[0].rpartition("/")[2].removesuffix(".py")
    record = {
        "promise": promise,
        "test": test,
        "figure": figure,
        "values": values,
        "command": shlex.join(["python", "-m", f"reliability.{module}", *sys.argv[1:]]),
        "commit": commit,
        "date": datetime.date.today().isoformat(),
        "machine": f"{os.cpu_count()} CPU cores",
    }
    RESULTS.mkdir(parents=True, exist_ok=True)
    path = RESULTS / f"{name}.json"
    path.write_text(json.dumps(record, indent=2) + "\n", encoding="utf-8")
    return path
