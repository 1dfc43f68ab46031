"""Runs cases in a worker process within a time budget, and starts another one when it breaks. Imports no torch."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import tempfile
import time
import uuid
from collections.abc import Sequence
from dataclasses import dataclass
from datetime import datetime, timezone
from pathlib import Path

from benchmarks.cases import Case
from benchmarks.measurement import FAILED, OK, SKIPPED, Measurement, append, latest_attempts, read
from benchmarks.registry import SUITES

# A case that takes this many times its estimate, and at least the seconds below, hangs.
_PATIENCE, _LEAST_PATIENCE = 4.0, 90.0
# Kept free of the budget for writing down and leaving.
_GRACE = 5.0


@dataclass(frozen=True)
class Plan:
    """What one call of the runner is to do.

    Attributes:
        cases: in the order of measuring.
        device: torch's name.
        out: file that the measurements are appended to.
        tiny: tiny sizes.
        budget: seconds for all.
        commit: of the source, where it cannot be asked for.
        command: how the runner was called.
    """

    cases: Sequence[Case]
    device: str
    out: Path
    tiny: bool
    budget: float
    commit: str | None
    command: str


def new_file(folder: Path) -> Path:
    """A new file of measurements, named by the time."""
    stamp = datetime.now(timezone.utc).strftime("%Y%m%d-%H%M%S")
    return folder / f"{stamp}-{uuid.uuid4().hex[:4]}.jsonl"


def missing_cases(cases: Sequence[Case], measured: Sequence[Measurement]) -> list[Case]:
    """Cases without a complete measurement: those never tried first, then those with a failure."""
    latest = latest_attempts(m for m in measured if not m.tiny)
    untried, failed = [], []
    for case in cases:
        group = latest.get((case.suite, case.name))
        if group is None:
            untried.append(case)
        elif any(m.status == FAILED for m in group):
            failed.append(case)
    return [*untried, *failed]


def run(plan: Plan) -> int:
    """Measures the cases; a worker that crashes, hangs or breaks its GPU costs one case.

    Returns:
        Number of cases that were not reached.
    """
    deadline = time.time() + plan.budget
    session = uuid.uuid4().hex[:12]
    waiting = [(case.suite, case.name) for case in plan.cases]
    with tempfile.TemporaryDirectory() as folder:
        while waiting and time.time() < deadline:
            marker = Path(folder) / "marker.json"
            marker.unlink(missing_ok=True)
            problem = _work(plan, waiting, Path(folder), session, deadline)
            done = {(m.suite, m.case) for m in read([plan.out.parent]) if m.session == session}
            if problem and marker.is_file():
                suite, name, _, *word = json.loads(marker.read_text(encoding="utf-8"))
                _record_failure(plan, suite, name, session, ": ".join([problem, *word]))
                done.add((suite, name))
            before = len(waiting)
            waiting = [key for key in waiting if key not in done]
            if problem is None or len(waiting) == before:
                if problem:
                    print(f"the worker ended before any case: {problem}", flush=True)
                break
    for suite, name in waiting:
        print(f"not measured: {suite}: {name}", flush=True)
    return len(waiting)


def _work(
    plan: Plan, waiting: list[tuple[str, str]], folder: Path, session: str, deadline: float
) -> str | None:
    """Runs one worker to its end; what went wrong, or None."""
    marker = folder / "marker.json"
    plan_file = folder / "plan.json"
    content = {
        "cases": waiting, "device": plan.device, "out": str(plan.out), "marker": str(marker), "session": session,
        "tiny": plan.tiny, "deadline": deadline, "commit": plan.commit, "command": plan.command,
    }  # fmt: skip
    plan_file.write_text(json.dumps(content), encoding="utf-8")
    environment = {"PYTORCH_CUDA_ALLOC_CONF": "expandable_segments:True", "HF_HUB_OFFLINE": "1", **os.environ}
    process = subprocess.Popen([sys.executable, "-m", "benchmarks.worker", str(plan_file)], env=environment)
    try:
        while process.poll() is None:
            time.sleep(0.2)
            if time.time() > deadline + _GRACE:
                process.kill()
                process.wait()
                print("out of time: the case in progress is left for the next call", flush=True)
                marker.unlink(missing_ok=True)
                return "out of time"
            limit = _hangs(marker, plan.tiny)
            if limit is not None:
                process.kill()
                process.wait()
                return f"gave no result within {limit:.0f} s"
    finally:
        if process.poll() is None:
            process.kill()
            process.wait()
    return None if process.returncode == 0 else f"the worker ended with exit code {process.returncode}"


def _hangs(marker: Path, tiny: bool) -> float | None:
    """The time limit that the case in progress has passed, or None."""
    try:
        suite, name, started, *_ = json.loads(marker.read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return None
    cases = SUITES[suite].tiny if tiny else SUITES[suite].cases
    estimate = next(case.seconds for case in cases if case.name == name)
    limit = max(_LEAST_PATIENCE, _PATIENCE * estimate)
    return limit if time.time() - started > limit else None


def _record_failure(plan: Plan, suite: str, name: str, session: str, problem: str) -> None:
    measurement = Measurement(
        suite, name, "all", "full", status=FAILED, error=problem, attempt=uuid.uuid4().hex[:12], session=session,
        created=datetime.now(timezone.utc).isoformat(timespec="seconds"), tiny=plan.tiny,
        provenance={"commit": plan.commit, "command": plan.command},
    )  # fmt: skip
    append(plan.out, [measurement])
    print(f"{suite}: {name}: {problem}", flush=True)


def summary(measured: Sequence[Measurement]) -> str:
    """How many measurements succeeded, failed and were skipped."""
    counts = {status: sum(m.status == status for m in measured) for status in (OK, FAILED, SKIPPED)}
    return ", ".join(f"{count} {status}" for status, count in counts.items())
