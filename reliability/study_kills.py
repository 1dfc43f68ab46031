"""SIGKILL at random moments of a study: started again, it ends with the records of an undisturbed one.

The kills spread over the whole study: of ten, the third falls at a random step of the third tenth of all steps, and at
a random moment after it, within the time that the undisturbed study took for a step on the average.

On a CPU every number of a record but time, memory and host must be equal. On a GPU, with a real model, the runs must be
the same and every score within the spread of the seeds:
`python -m reliability.study_kills --device cuda --model PATH --data_dir DIR`.
"""

from __future__ import annotations

import argparse
import gc
import json
import os
import random
import signal
import statistics
import sys
import tempfile
import time
from collections import Counter, defaultdict
from collections.abc import Sequence
from dataclasses import asdict, dataclass, replace
from itertools import pairwise
from pathlib import Path
from typing import Any

import yaml
from transformers import TrainerCallback, TrainerControl, TrainerState, TrainingArguments

from graphlora.records import RunRecord
from graphlora.study.claims import claims_of
from graphlora.study.kept import KeptWorkbench
from graphlora.study.plan import Run, make_runs
from graphlora.study.records import StudyFolder, study_folder
from graphlora.study.runner import run_study
from graphlora.study.spec import BASE, Overrides, load_spec
from graphlora.training.trainer import AdapterTrainer
from reliability.record import write_record
from reliability.tiny import choice_rows, make_model, write_rows

PROMISE = (
    "A study killed with SIGKILL at random moments and started again ends with the records of an undisturbed one: on a "
    "CPU equal in everything but time, memory and host; on a GPU the same runs, with scores within the spread of seeds."
)
TEST = "tests/study/test_kill.py::test_ten_kills_leave_the_same_records"
# They differ from run to run, by the machine.
TIMES = ("step_time", "tokens_per_second", "train_seconds")
MACHINE = ("created", "wall_time", "peak_memory", "provenance")
SEED = 7
POLL_SECONDS = 0.01


@dataclass(frozen=True)
class Kill:
    """One kill.

    Attributes:
        records: Records that were there.
        variants: Variants of the runs that the process had claimed.
        step: Last step that it had done of them.
        resumed_from: Step that the process after it went on from; 0 where it began a run.
    """

    records: int
    variants: list[str]
    step: int
    resumed_from: int = 0


def main() -> int:
    """Runs the study undisturbed and killed, and writes the record."""
    parser = argparse.ArgumentParser(prog="python -m reliability.study_kills", description=__doc__)
    parser.add_argument("--kills", type=int, default=10)
    parser.add_argument("--longest", type=float, default=30.0, help="seconds after a step, at most")
    parser.add_argument("--device", choices=["cpu", "cuda"], default="cpu")
    parser.add_argument("--model", help="base model; left out: a tiny random one")
    parser.add_argument("--data_dir", help="folder with ARC's files, for a real model")
    options = parser.parse_args()
    if (options.model is None) != (options.data_dir is None):
        parser.error("a real model needs data, and data a model: give both --model and --data_dir")
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        study = _real_study(folder, options) if options.model else tiny_study(folder)
        kills = undisturbed_and_killed(study, folder, options.kills, options.longest, options.data_dir)
        first, second = (records(place) for place in (folder / "undisturbed", folder / "killed"))
        left = [path.name for place in ("claims", ".work") for path in folder.glob(f"killed/*/{place}/*")]
    values: dict[str, Any] = compare(first, second) | summarize(kills) | {"left_behind": left}
    hit = ", ".join(f"{count} in {name}" for name, count in values["killed_variants"].items())
    figure = (
        f"{len(kills)} kills ({hit}) at {kills[0].records} to {kills[-1].records} records, {values['resumed']} runs "
        f"went on from a checkpoint; {values['runs']} runs, {'the same' if values['same_runs'] else 'OTHER'} ones; "
        f"{values['differing']} records differ, scores by {values['largest_difference']:.4f} at most "
        f"(standard deviation over seeds {values['spread']:.4f})"
    )
    print(figure)
    on_gpu = options.device == "cuda"
    machine = None
    if on_gpu:
        import torch

        machine = torch.cuda.get_device_name()
    name = "study_kills_gpu" if on_gpu else "study_kills"
    print(write_record(name, PROMISE, TEST, figure, values, machine=machine))
    whole = values["same_runs"] and not left and len(kills) == options.kills
    close = values["largest_difference"] <= values["spread"] if on_gpu else not values["differing"]
    return 0 if whole and close else 1


def tiny_study(folder: Path) -> Path:
    """A study of two methods and two seeds on a random model; a run takes seconds, and scores differ between runs."""
    rows = choice_rows(60)
    for position, row in enumerate(rows):
        # Three shares no factor with the ten things, so that what is asked has been seen.
        row["split"] = "test" if position % 3 == 0 else "train"
    policy = {
        "r": 2, "lora_alpha": 4, "lora_dropout": 0.1, "dtype": "float32", "learning_rate": 1e-2, "max_steps": 24,
        "eval_steps": 4, "logging_steps": 2, "per_device_train_batch_size": 4, "training_args": {"use_cpu": True},
    }  # fmt: skip
    return _write(
        folder,
        {
            "study": "kills",
            "models": [str(make_model(folder / "model"))],
            "tasks": [str(write_rows(folder / "colors.jsonl", rows))],
            "seeds": [0, 1],
            "policy": policy,
            "variants": {
                "lora": {"method": "lora"},
                "graphlora": {"num_experts": 4, "router_hidden_size": 16},
            },
        },
    )


def _real_study(folder: Path, options: argparse.Namespace) -> Path:
    policy = {
        "scoring": "cloze", "train_limit": 1000, "eval_limit": 100, "limit_seed": 0, "learning_rate": 1e-3,
        "lora_dropout": 0.0, "per_device_train_batch_size": 32, "logging_steps": 5, "max_steps": 30, "eval_steps": 5,
        "eval_strategy": "steps", "truncation": "prompt",
    }  # fmt: skip
    return _write(
        folder,
        {
            "study": "kills",
            "models": [{"name": "model", "model": options.model}],
            "tasks": ["arc_easy"],
            "seeds": [0, 1, 2],
            "evaluate": "test",
            "metric": "acc_norm",
            "test_limit": 1000,
            "policy": policy,
            "variants": {"lora": {"method": "lora", "r": 16}, "graphlora": {"preset": "graphlora"}},
        },
    )


def _write(folder: Path, values: dict[str, Any]) -> Path:
    path = folder / "study.yaml"
    path.write_text(yaml.safe_dump(values, sort_keys=False), encoding="utf-8")
    return path


def undisturbed_and_killed(
    study: Path, folder: Path, kills: int, longest: float, data_dir: str | None = None
) -> list[Kill]:
    """The study in `folder/undisturbed`, and in `folder/killed` with that many kills.

    The processes are forks of this one, which has loaded the libraries and computed nothing.

    Args:
        study: Its file.
        folder: Where everything goes.
        kills: Their number.
        longest: Seconds that a kill waits after its step, at most.
        data_dir: Folder with the data of shipped tasks.

    Returns:
        What each kill hit; a process that had ended before its kill is left out.
    """
    import graphlora.study.execute  # noqa: F401 - loaded once, for all forks

    # Collecting what the libraries hold would copy it into every fork, which took two thirds of a start.
    gc.freeze()
    spec = load_spec(str(study), Overrides(data_dir=data_dir))
    runs, draw, found = make_runs(spec), random.Random(SEED), []
    started = time.monotonic()
    os.waitpid(_fork(runs, study_folder(folder / "undisturbed", spec.study), folder / "undisturbed.log"), 0)
    num_steps = sum(run.recipe().max_steps for run in runs if run.variant != BASE)
    per_step = (time.monotonic() - started) / num_steps
    killed = study_folder(folder / "killed", spec.study)
    logs = [folder / f"killed-{number}.log" for number in range(kills + 1)]
    for number, (log, following) in enumerate(pairwise(logs)):
        moment = draw.uniform(number, number + 1) / kills * num_steps
        child = _fork(runs, killed, log)
        if _wait_for_step(int(moment), child, runs, killed, log):
            time.sleep(min(longest, moment % 1 * per_step))
        os.kill(child, signal.SIGKILL)
        if os.WIFSIGNALED(os.waitpid(child, 0)[1]):
            found.append((_what_it_hit(child, runs, killed, log), following))
            print(f"killed at step {found[-1][0].step} of {found[-1][0].variants}", flush=True)
    os.waitpid(_fork(runs, killed, logs[-1]), 0)
    gc.unfreeze()
    return [replace(kill, resumed_from=_steps(log)[0][2]) for kill, log in found]


def summarize(kills: Sequence[Kill]) -> dict[str, Any]:
    """What the kills hit: every one, their number by variant, and how many runs went on from a checkpoint."""
    return {
        "kills": [asdict(kill) for kill in kills],
        "records_at_kills": [kill.records for kill in kills],
        "killed_variants": dict(Counter(name for kill in kills for name in kill.variants)),
        "resumed": sum(kill.resumed_from > 0 for kill in kills),
    }


class _Steps(TrainerCallback):
    """Writes a line `RUN from STEP` as training begins, and `RUN at STEP` after each step."""

    def __init__(self, log: Path) -> None:
        self._log = log

    def on_train_begin(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        """Where it goes on from."""
        self._write(args, "from", state)

    def on_step_end(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        """How far it is."""
        self._write(args, "at", state)

    def _write(self, args: TrainingArguments, word: str, state: TrainerState) -> None:
        run_id = Path(str(args.output_dir)).name
        with self._log.open("a", encoding="utf-8") as file:
            file.write(f"{run_id} {word} {state.global_step}\n")


def _fork(runs: Sequence[Run], folder: StudyFolder, log: Path) -> int:
    """A process that does what is missing of the study, and writes its steps to a log."""
    child = os.fork()
    if child == 0:
        code, usual = 1, KeptWorkbench.callbacks

        def callbacks(self: KeptWorkbench, trainer: AdapterTrainer) -> list[Any]:
            return [*usual(self, trainer), _Steps(log)]

        try:
            KeptWorkbench.callbacks = callbacks
            code = run_study(runs, folder, tell=lambda line: None)
        finally:
            os._exit(min(code, 1))
    return child


def _wait_for_step(step: int, child: int, runs: Sequence[Run], folder: StudyFolder, log: Path) -> bool:
    """Wait until a process has trained and the study has done that many steps; False where it ends before."""
    steps = {run.run_id: run.recipe().max_steps for run in runs if run.variant != BASE}
    while os.waitid(os.P_PID, child, os.WEXITED | os.WNOHANG | os.WNOWAIT) is None:
        if lines := _steps(log):
            done = {run.run_id for run in runs if folder.is_done(run)}
            run_id, _, at = lines[-1]
            whole = sum(num for name, num in steps.items() if name in done)
            if whole + (0 if run_id in done else at) >= step:
                return True
        time.sleep(POLL_SECONDS)
    return False


def _what_it_hit(child: int, runs: Sequence[Run], folder: StudyFolder, log: Path) -> Kill:
    variants = {run.run_id: run.variant for run in runs}
    held = claims_of(folder.path, child)
    return Kill(
        records=sum(folder.is_done(run) for run in runs),
        variants=[variants[run_id] for run_id in held],
        step=max((at for run_id, _, at in _steps(log) if run_id in held), default=0),
    )


def _steps(log: Path) -> list[tuple[str, str, int]]:
    """Whole lines of a log: run, word, step."""
    text = log.read_text(encoding="utf-8") if log.exists() else ""
    parts = [line.split() for line in text.splitlines(keepends=True) if line.endswith("\n")]
    return [(run_id, word, int(step)) for run_id, word, step in parts]


def records(folder: Path) -> dict[str, dict[str, Any]]:
    """Records of all studies below a folder, without time, memory and host."""
    found = {}
    for path in folder.glob("*/*.json"):
        values = json.loads(RunRecord.read(path).to_json())
        kept = {name: value for name, value in values.items() if name not in MACHINE}
        metrics = {name: value for name, value in values["metrics"].items() if name not in TIMES}
        found[path.name] = kept | {"metrics": metrics}
    return found


def compare(first: dict[str, dict[str, Any]], second: dict[str, dict[str, Any]]) -> dict[str, Any]:
    """How two sets of records differ: in their runs, in any number, and in scores beside the spread over seeds."""
    shared = first.keys() & second.keys()
    scores: dict[str, list[float]] = defaultdict(list)
    for record in first.values():
        scores[record["variant"]].append(record["metrics"]["score"])
    spreads = [statistics.stdev(values) for values in scores.values() if len(values) > 1]
    gaps = [abs(first[name]["metrics"]["score"] - second[name]["metrics"]["score"]) for name in shared]
    return {
        "runs": len(first),
        "same_runs": bool(first) and first.keys() == second.keys(),
        "differing": sum(first[name] != second[name] for name in shared),
        "largest_difference": max(gaps, default=0.0),
        "spread": statistics.fmean(spreads) if spreads else 0.0,
    }


if __name__ == "__main__":
    sys.exit(main())
