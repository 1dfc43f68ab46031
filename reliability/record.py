"""The record of one promise: what was promised, what was done, what was found."""

from __future__ import annotations

import datetime
import json
import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
FOLDER = ROOT / "results" / "reliability"


def write_record(name: str, promise: str, test: str, figure: str, values: dict[str, object]) -> Path:
    """Write `results/reliability/NAME.json`."""
    commit = subprocess.run(
        ["git", "rev-parse", "--short", "HEAD"], cwd=ROOT, capture_output=True, text=True, check=False
    ).stdout.strip()
    words = [Path(sys.argv[0]).stem, *sys.argv[1:]]
    record = {
        "promise": promise,
        "test": test,
        "figure": figure,
        "values": values,
        "command": f"python -m reliability.{' '.join(words)}",
        "commit": commit,
        "date": datetime.date.today().isoformat(),
        "machine": "2 CPU cores",
    }
    FOLDER.mkdir(parents=True, exist_ok=True)
    path = FOLDER / f"{name}.json"
    path.write_text(json.dumps(record, indent=2) + "\n", encoding="utf-8")
    return path
