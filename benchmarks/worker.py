"""The process that measures: takes cases one by one from its arguments and appends what it finds."""

from __future__ import annotations

import functools
import importlib
import json
import sys
import time
import uuid
import warnings
from datetime import datetime, timezone
from pathlib import Path
from typing import Any

import torch

from benchmarks.cases import Case
from benchmarks.context import Context, Gate
from benchmarks.failures import NotHere, breaks_the_device, failures
from benchmarks.measurement import Measurement, append
from benchmarks.registry import SUITES
from graphlora.benchmark.timing import describe_error, release
from graphlora.evaluation.efficiency import device_name
from graphlora.records import provenance
from graphlora.training.loading import DTYPES

# Exit code that asks for a new process, because this one's GPU context is broken.
RESTART = 75


def main(plan_file: Path) -> int:
    """Measures the cases of a plan, in order.

    Args:
        plan_file: JSON with `cases` (pairs of suite and name), `device`, `out`, `marker`, `session`, `tiny`,
            `deadline` (time.time()), `commit` and `command`.

    Returns:
        Exit code: 0, or `RESTART`.
    """
    warnings.simplefilter("ignore")
    plan = json.loads(plan_file.read_text(encoding="utf-8"))
    device = torch.device(plan["device"])
    gate = Gate()
    facts = _facts(plan, device)
    marker = Path(plan["marker"])
    sys.excepthook = functools.partial(_leave_word, marker)
    for suite_name, case_name in plan["cases"]:
        case = find_case(suite_name, case_name, plan["tiny"])
        left = plan["deadline"] - time.time()
        if left < case.seconds and not plan["tiny"]:
            print(
                f"{suite_name}: {case_name}: not started, {left:.0f} s left of {case.seconds:.0f}", flush=True
            )
            continue
        attempt = uuid.uuid4().hex[:12]
        marker.write_text(json.dumps([suite_name, case_name, time.time()]), encoding="utf-8")
        started = time.perf_counter()
        own_device = _device_of(suite_name, device)
        context = Context(case, own_device, _dtype_of(case, own_device), plan["tiny"], gate)
        broken = _measure(context)
        stamps = {
            "attempt": attempt,
            "session": plan["session"],
            "created": datetime.now(timezone.utc).isoformat(timespec="seconds"),
            "provenance": facts | {"seconds": round(time.perf_counter() - started, 1)},
        }
        measurements = context.finished(**stamps)
        append(Path(plan["out"]), measurements)
        marker.unlink(missing_ok=True)
        _report(measurements, time.perf_counter() - started)
        del context
        if broken:
            return RESTART
        release(device)
    return 0


def _leave_word(marker: Path, kind: type[BaseException], error: BaseException, trace: Any) -> None:
    """Adds an error that ends this process to the marker, for the runner to record."""
    sys.__excepthook__(kind, error, trace)
    if marker.is_file():
        case = json.loads(marker.read_text(encoding="utf-8"))
        marker.write_text(json.dumps([*case[:3], describe_error(error)]), encoding="utf-8")


def find_case(suite: str, name: str, tiny: bool) -> Case:
    """A case of the registry by its names."""
    cases = SUITES[suite].tiny if tiny else SUITES[suite].cases
    return next(case for case in cases if case.name == name)


def _measure(context: Context) -> bool:
    """Runs the suite's function; says whether the device is broken since."""
    module = importlib.import_module(f"benchmarks.suites.{context.case.suite}")
    try:
        module.measure(context)
    except NotHere as error:
        context.skip("all", str(error))
    except failures() as error:
        context.fail("all", describe_error(error))
    errors = " ".join(m.error or "" for m in context.found)
    return breaks_the_device(RuntimeError(errors))


def _device_of(suite: str, device: torch.device) -> torch.device:
    return torch.device("cpu") if SUITES[suite].device == "cpu" else device


def _dtype_of(case: Case, device: torch.device) -> torch.dtype:
    usual = "bfloat16" if device.type == "cuda" else "float32"
    return DTYPES[case.params.get("dtype", usual)]


def _facts(plan: dict[str, Any], device: torch.device) -> dict[str, Any]:
    facts = provenance()
    if plan["commit"]:
        facts["commit"] = plan["commit"]
    facts["device"] = device_name(device)
    facts["command"] = plan["command"]
    if device.type == "cuda":
        facts["cuda"] = torch.version.cuda
    return facts


def _report(measurements: list[Measurement], seconds: float) -> None:
    if not measurements:
        return
    first = measurements[0]
    print(f"{first.suite}: {first.case} ({seconds:.1f} s)", flush=True)
    for m in measurements:
        if m.value is None:
            print(f"    {m.candidate:<26} {m.phase:<18} {m.status}: {m.error}", flush=True)
        else:
            spread = "" if m.low is None else f"  [{m.low:.4g}, {m.high:.4g}]"
            print(f"    {m.candidate:<26} {m.phase:<18} {m.value:12.4g} {m.unit}{spread}", flush=True)


if __name__ == "__main__":
    sys.exit(main(Path(sys.argv[1])))
