"""Tables for people: what a study will do, and how far it is."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

from graphlora.errors import GraphLoraError
from graphlora.study.estimate import RULE, Estimate, Estimator
from graphlora.study.plan import Run
from graphlora.study.records import StudyFolder
from graphlora.study.runner import duration, visible_devices
from graphlora.study.spec import StudySpec
from graphlora.untrusted import check_model_place, local_path

State = Literal["done", "running", "failed", "missing"]
STATES: tuple[State, ...] = ("done", "running", "failed", "missing")
FAILURES_SHOWN = 10


@dataclass(frozen=True)
class Status:
    """State of every run of a study.

    Attributes:
        states: By run, in the order of the runs.
        errors: Error line by run that failed.
        estimates: Cost by run.
    """

    runs: tuple[Run, ...]
    states: dict[str, State]
    errors: dict[str, str]
    estimates: dict[str, Estimate]

    def count(self, state: State, runs: Sequence[Run] | None = None) -> int:
        """Runs of a state."""
        return sum(self.states[run.run_id] == state for run in (self.runs if runs is None else runs))

    def seconds_left(self, slots: int = 1) -> float:
        """Time for what is missing and running, with that many workers."""
        left = [
            self.estimates[r.run_id].seconds
            for r in self.runs
            if self.states[r.run_id] in ("running", "missing")
        ]
        return sum(left) / max(1, slots)


def find_status(runs: Sequence[Run], folder: StudyFolder, on_gpu: bool | None = None) -> Status:
    """Look at the records, failures and claims of a study.

    Args:
        runs: Runs of the study.
        folder: Its folder.
        on_gpu: Whether to estimate for a GPU; found out when left out.

    Raises:
        GraphLoraError: A broken record.
    """
    running, failures, records = folder.running(), folder.failures(runs), folder.records(runs)
    states: dict[str, State] = {}
    for run in runs:
        name = run.run_id
        states[name] = "done" if name in records else "running" if name in running else "missing"
        if states[name] == "missing" and name in failures:
            states[name] = "failed"
    estimator = Estimator(runs, records, visible_devices() != [""] if on_gpu is None else on_gpu)
    return Status(tuple(runs), states, failures, {run.run_id: estimator(run) for run in runs})


def plan_text(spec: StudySpec, status: Status, folder: StudyFolder, slots: int) -> str:
    """What `graphlora study plan` prints."""
    missing = [run for run in status.runs if status.states[run.run_id] == "missing"]
    lines = [f"{spec.study}: {spec.description}" if spec.description else spec.study, ""]
    lines += [
        f"models    {', '.join(model.name for model in spec.models)}",
        f"tasks     {', '.join(task.name for task in spec.tasks)}",
        f"seeds     {', '.join(map(str, spec.seeds))}",
        f"score     {spec.metric} on the {spec.evaluate} split",
        f"records   {folder.path}",
        "",
        *_table(status, with_estimate=True),
        "",
    ]
    if not missing:
        return "\n".join(
            [*lines, f"all {len(status.runs)} runs are done or failed; see: graphlora study report"]
        )
    sources = {status.estimates[run.run_id].source for run in missing}
    devices = sorted({status.estimates[run.run_id].device for run in missing})
    lines.append(
        f"{len(missing)} of {len(status.runs)} runs are missing: about {duration(status.seconds_left(slots))} "
        f"with {slots} worker{'s' if slots > 1 else ''} on {' and '.join(devices)}"
    )
    if "rule" in sources:
        lines.append(f"where no record tells, by rule of thumb: {RULE}")
    guessed = {run.recipe().model for run in missing if status.estimates[run.run_id].source == "rule"}
    lines += filter(
        None, (_doubt(name, name in guessed) for name in sorted({run.recipe().model for run in missing}))
    )
    return "\n".join(lines)


def _doubt(model: str, guessed: bool) -> str | None:
    """A line about a model that is not on this disk: that it is missing, or that its size is a guess."""
    guess = "its size is taken from its name, or as a billion parameters"
    try:
        check_model_place(model)
    except GraphLoraError as error:
        return f"{error}: {guess}"
    if not guessed or local_path(model) is not None:
        return None
    return f"no folder {model} here, and the hub is not asked before a run: {guess}"


def status_text(spec: StudySpec, status: Status, folder: StudyFolder, slots: int) -> str:
    """What `graphlora study status` prints."""
    counts = ", ".join(f"{status.count(state)} {state}" for state in STATES)
    lines = [f"{spec.study} in {folder.path}: {counts}", "", *_table(status, with_estimate=False)]
    running = [run for run in status.runs if status.states[run.run_id] == "running"]
    owners = folder.running()
    for run in running:
        owner = owners.get(run.run_id)
        lines.append(f"running: {run.title}{f' (process {owner.pid} on {owner.host})' if owner else ''}")
    failed = [run for run in status.runs if status.states[run.run_id] == "failed"]
    lines += [f"failed: {run.title}: {status.errors[run.run_id]}" for run in failed[:FAILURES_SHOWN]]
    if len(failed) > FAILURES_SHOWN:
        lines.append(f"and {len(failed) - FAILURES_SHOWN} more that failed")
    if failed:
        lines.append("do the failed ones again with: graphlora study run ... --retry-failed")
    if status.count("missing") or running:
        workers = max(slots, len(running))
        left = duration(status.seconds_left(workers))
        lines.append(f"time left: about {left} with {workers} worker{'s' if workers > 1 else ''}")
    return "\n".join(lines)


def _table(status: Status, with_estimate: bool) -> list[str]:
    """One line per variant: its runs by state."""
    variants = list(dict.fromkeys(run.variant for run in status.runs))
    width = max(len("variant"), *(len(name) for name in variants))
    head = f"{'variant':<{width}}  {'runs':>5} " + " ".join(f"{state:>8}" for state in STATES)
    lines = [head + (f" {'each':>9} {'memory':>9}" if with_estimate else "")]
    for name in variants:
        runs = [run for run in status.runs if run.variant == name]
        line = f"{name:<{width}}  {len(runs):>5} " + " ".join(f"{status.count(s, runs):>8}" for s in STATES)
        if with_estimate:
            costs = [status.estimates[run.run_id] for run in runs]
            memory = max((cost.memory for cost in costs if cost.memory is not None), default=None)
            each = duration(sum(cost.seconds for cost in costs) / len(costs))
            line += f" {each:>9} {'unknown' if memory is None else f'{memory / 2**30:.1f} GiB':>9}"
        lines.append(line)
    return lines


def check_adapters(spec: StudySpec, runs: Sequence[Run]) -> None:
    """Build every variant's adapter config, so that a mistake is told before the first run. Imports torch.

    Raises:
        GraphLoraError: Options that the method does not have, or values that it refuses; names the line.
    """
    from graphlora.errors import GraphLoraError
    from graphlora.training.adapting import adapter_config

    seen = set()
    for run in runs:
        if run.variant not in seen and run.seed is not None:
            seen.add(run.variant)
            try:
                adapter_config(run.recipe(Path("unused")))
            except GraphLoraError as error:
                raise spec.lines.error(
                    ("variants", run.variant), f"variant {run.variant}: {error}"
                ) from error
