"""SIGKILL at random moments of a study: started again, it ends with the records of an undisturbed one.

On a CPU every number of a record but time, memory and host must be equal. On a GPU, with a real model, the runs must be
the same and every score within the spread of the seeds:
`python -m reliability.study_kills --device cuda --model PATH --data_dir DIR --longest 20`.
"""

from __future__ import annotations

import argparse
import json
import os
import random
import signal
import statistics
import sys
import tempfile
import time
from collections import defaultdict
from pathlib import Path
from typing import Any

import yaml

from graphlora.records import RunRecord
from graphlora.study.plan import make_runs
from graphlora.study.records import study_folder
from graphlora.study.runner import run_study
from graphlora.study.spec import Overrides, load_spec
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


def main() -> int:
    """Runs the study undisturbed and killed, and writes the record."""
    parser = argparse.ArgumentParser(prog="python -m reliability.study_kills", description=__doc__)
    parser.add_argument("--kills", type=int, default=10)
    parser.add_argument("--longest", type=float, default=1.5, help="seconds until a kill, at most")
    parser.add_argument("--device", choices=["cpu", "cuda"], default="cpu")
    parser.add_argument("--model", help="base model; left out: a tiny random one")
    parser.add_argument("--data_dir", help="folder with ARC's files, for a real model")
    options = parser.parse_args()
    if (options.model is None) != (options.data_dir is None):
        parser.error("a real model needs data, and data a model: give both --model and --data_dir")
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        study = _real_study(folder, options) if options.model else tiny_study(folder)
        counts = undisturbed_and_killed(study, folder, options.kills, options.longest, options.data_dir)
        first, second = (records(place) for place in (folder / "undisturbed", folder / "killed"))
        left = [path.name for place in ("claims", ".work") for path in folder.glob(f"killed/*/{place}/*")]
    values = compare(first, second) | {"records_at_kills": counts, "left_behind": left}
    figure = (
        f"{len(counts)} kills, {values['runs']} runs, {'the same' if values['same_runs'] else 'OTHER'} ones; "
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
    whole = values["same_runs"] and not left
    close = values["largest_difference"] <= values["spread"] if on_gpu else not values["differing"]
    return 0 if whole and close else 1


def tiny_study(folder: Path) -> Path:
    """A study of two methods and two seeds on a random model; a run takes about a second, so kills fall into it."""
    rows = choice_rows(50)
    for position, row in enumerate(rows):
        row["split"] = "test" if position % 5 == 0 else "train"
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
        "lora_dropout": 0.0, "per_device_train_batch_size": 32, "logging_steps": 5, "max_steps": 30, "eval_steps": 15,
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
) -> list[int]:
    """The study in `folder/undisturbed`, and in `folder/killed` with that many kills; the records at each kill.

    The processes are forks of this one, which has loaded the libraries and computed nothing.
    """
    import graphlora.study.execute  # noqa: F401 - loaded once, for all forks

    draw, counts = random.Random(SEED), []
    alone = _fork(study, folder / "undisturbed", data_dir)
    os.waitpid(alone, 0)
    for _ in range(kills):
        child = _fork(study, folder / "killed", data_dir)
        time.sleep(draw.uniform(0.1, longest))
        os.kill(child, signal.SIGKILL)
        os.waitpid(child, 0)
        counts.append(len(list(folder.glob("killed/*/*.json"))))
        print(f"killed with {counts[-1]} records", flush=True)
    os.waitpid(_fork(study, folder / "killed", data_dir), 0)
    return counts


def _fork(study: Path, results: Path, data_dir: str | None) -> int:
    """A process that does what is missing of the study."""
    child = os.fork()
    if child == 0:
        code = 1
        try:
            spec = load_spec(str(study), Overrides(data_dir=data_dir))
            code = run_study(make_runs(spec), study_folder(results, spec.study), tell=lambda line: None)
        finally:
            os._exit(min(code, 1))
    return child


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
