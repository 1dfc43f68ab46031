"""The tests with the oldest and the newest versions of the dependencies, each in an environment of its own."""

from __future__ import annotations

import argparse
import os
import re
import subprocess
import sys
from pathlib import Path

from graphlora.errors import GraphLoraError
from reliability.record import ROOT, write_record

PROMISE = "The tests pass with the oldest versions that are declared, all at once, and with the newest ones."
TEST = "`scripts/compat.sh oldest`, `scripts/compat.sh newest`, weekly"
SUMMARY = re.compile(r"^(?:\d+ failed, )?\d+ passed.* in [\d.]+s", re.MULTILINE)
COUNTS = re.compile(r"(\d+) (passed|failed|error)")
VERSIONS = re.compile(r"^compat: (.*)$", re.MULTILINE)


def main() -> int:
    """Runs the tests with each set of versions and writes the record."""
    parser = argparse.ArgumentParser(prog="python -m reliability.versions", description=__doc__)
    parser.add_argument("--venvs", type=Path, help="folder that keeps the environments oldest and newest")
    parser.add_argument(
        "--logs", type=Path, nargs="*", help="outputs of finished runs of scripts/compat.sh instead"
    )
    options = parser.parse_args()
    if options.logs:
        texts = [path.read_text(encoding="utf-8") for path in options.logs]
    else:
        texts = [_run(which, options.venvs) for which in ("oldest", "newest")]
    try:
        found = [read_summary(text) for text in texts]
    except GraphLoraError as error:
        sys.stderr.write(f"reliability: error: {error}\n")
        return 2
    figure = "; ".join(f"{run['passed']} passed, {run['failed']} failed ({run['versions']})" for run in found)
    print(figure)
    print(write_record("versions", PROMISE, TEST, figure, {"runs": found}))
    return 0 if all(run["failed"] == 0 for run in found) else 1


def read_summary(text: str) -> dict[str, object]:
    """Versions, and tests that passed and failed, in the output of `scripts/compat.sh`.

    Raises:
        GraphLoraError: It did not come to its end.
    """
    versions, summary = VERSIONS.search(text), SUMMARY.search(text)
    if versions is None or summary is None:
        raise GraphLoraError(f"scripts/compat.sh did not finish: {text.strip()[-500:]}")
    counts = {name: int(number) for number, name in COUNTS.findall(summary[0])}
    failed = counts.get("failed", 0) + counts.get("error", 0)
    return {"versions": versions[1], "passed": counts["passed"], "failed": failed}


def _run(which: str, venvs: Path | None) -> str:
    environment = dict(os.environ)
    if venvs is not None:
        environment["VENV"] = str(venvs.resolve() / which)
    words = [str(ROOT / "scripts" / "compat.sh"), which, sys.executable]
    done = subprocess.run(words, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, env=environment)
    print(done.stdout[-3000:], flush=True)
    return done.stdout


if __name__ == "__main__":
    sys.exit(main())
