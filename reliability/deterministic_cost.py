"""What deterministic mode costs: the same short training with and without it, in turns, in one process.

On a CPU the time is the process's own, which other work on the machine does not change; on a GPU it is the time of a
step. `--device cuda --model PATH` measures a real model.
"""

from __future__ import annotations

import argparse
import shutil
import statistics
import sys
import tempfile
import time
from pathlib import Path

from graphlora.training import Recipe, train
from reliability.record import write_record
from reliability.tiny import recipe

PROMISE = "Deterministic mode costs no more than a tenth of a step's time on a CPU."
TEST = "`python -m reliability.deterministic_cost`"
LARGEST = 1.1


def main() -> int:
    """Trains in turns and writes the record."""
    parser = argparse.ArgumentParser(prog="python -m reliability.deterministic_cost", description=__doc__)
    parser.add_argument("--count", type=int, default=7, help="pairs of runs")
    parser.add_argument("--steps", type=int, default=40, help="optimizer steps of a run")
    parser.add_argument("--device", choices=["cpu", "cuda"], default="cpu")
    parser.add_argument("--model", help="base model; left out: a tiny random one")
    options = parser.parse_args()
    folder = Path(tempfile.mkdtemp())
    times: dict[bool, list[float]] = {False: [], True: []}
    try:
        for number in range(options.count + 1):
            for deterministic in times:
                seconds = _seconds(folder, deterministic, options)
                # The first pair warms up.
                if number:
                    times[deterministic].append(seconds)
            print(f"pair {number} of {options.count}", flush=True)
    finally:
        shutil.rmtree(folder, ignore_errors=True)
    ratios = [with_it / plain for plain, with_it in zip(*times.values(), strict=True)]
    ratio = statistics.median(ratios)
    figure = (
        f"{ratio:.3f} of the time without it (median of {options.count} pairs, {min(ratios):.3f} to {max(ratios):.3f}; "
        f"{options.steps} steps of {options.model or 'a tiny model'})"
    )
    print(figure)
    name = "deterministic_cost" + ("" if options.device == "cpu" else "_gpu")
    machine = None
    if options.device == "cuda":
        import torch

        machine = torch.cuda.get_device_name()
    values = {"ratios": ratios, "plain": times[False], "deterministic": times[True]}
    print(
        write_record(
            name,
            PROMISE if machine is None else "What deterministic mode costs on a GPU.",
            TEST,
            figure,
            values,
            machine=machine,
        )
    )
    return 0 if machine is not None or ratio <= LARGEST else 1


def _seconds(folder: Path, deterministic: bool, options: argparse.Namespace) -> float:
    """Seconds of one training: the process's own time on a CPU, the sum of the steps on a GPU."""
    values = recipe(folder) | {
        "output_dir": str(folder / "out"),
        "max_steps": options.steps,
        "eval_strategy": "no",
        "eval_steps": options.steps,
        "load_best_model_at_end": False,
        "deterministic": deterministic,
    }
    values["training_args"] |= {"use_cpu": options.device == "cpu"}
    if options.model is not None:
        values["model"] = options.model
    started = time.process_time()
    result = train(Recipe.from_dict(values), overwrite=True)
    if options.device == "cpu":
        return time.process_time() - started
    return result.metrics["step_time"] * options.steps


if __name__ == "__main__":
    sys.exit(main())
