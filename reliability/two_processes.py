"""Two processes learn what one learns: DDP, FSDP2, and runs that go on with another number of processes.

Run as `python -m reliability.two_processes [--steps 40]`. Rows are of unequal length, so the processes hold unequal
numbers of tokens. Under SGD, and once under Adam.
"""

from __future__ import annotations

import argparse
import sys
import tempfile
from pathlib import Path
from typing import Any

from safetensors.torch import load_file

from reliability.launching import EFFICIENT, FSDP, make_rows, start
from reliability.record import write_record
from reliability.tiny import make_model

ROWS_PER_STEP = 8
GRAPHLORA = {"method": "graphlora", "num_experts": 4, "top_k": 2, "router_hidden_size": 16}
METHODS = ("lora", "graphlora")
TEST = "tests/training/test_processes.py::test_two_processes_learn_what_one_learns"


def main() -> int:
    """Run all, write both records; 1 where something differs more than rounding does."""
    parser = argparse.ArgumentParser(prog="python -m reliability.two_processes", description=__doc__)
    parser.add_argument("--steps", type=int, default=40, help="optimizer steps of each run")
    steps = parser.parse_args().steps
    with tempfile.TemporaryDirectory() as folder:
        return _compare(Path(folder), steps)


def _compare(folder: Path, steps: int) -> int:
    model = make_model(folder / "model")
    data = make_rows(folder / "rows.jsonl", 24 * steps // 5 * 2, (1, 12))

    def recipe(name: str, method: str, processes: int, **changes: Any) -> dict[str, Any]:
        return (
            {
                "model": str(model),
                "task": str(data),
                "output_dir": str(folder / name),
                "dtype": "float32",
                "optim": "sgd",
                "learning_rate": 0.01,
                "per_device_train_batch_size": ROWS_PER_STEP // 2 // processes,
                "gradient_accumulation_steps": 2,
                "max_steps": steps,
                "lr_scheduler_type": "constant",
                "eval_strategy": "no",
                "save_steps": steps // 2,
                "logging_steps": 1,
                "training_args": {"use_cpu": True, "disable_tqdm": True},
            }
            | (GRAPHLORA if method == "graphlora" else {"method": "lora"})
            | changes
        )

    def case(
        name: str, method: str, processes: int, environment: dict[str, str], **changes: Any
    ) -> dict[str, Any]:
        resume = changes.pop("resume", False)
        whole = recipe(name, method, processes, **changes)
        return {"name": name, "recipe": whole, "environment": environment, "resume": resume}

    half = {"max_steps": steps // 2}
    _say("one process")
    adam = {"optim": "adamw_torch", "learning_rate": 1e-3}
    cases = [case(f"one-{m}", m, 1, {}) for m in METHODS]
    cases += [case("up", "graphlora", 1, {}, **half), case("one_adam", "graphlora", 1, {}, **adam)]
    one = start(cases, folder / "seen1", 1)
    _say("two processes")
    ways = {"ddp": {}, "fsdp2": FSDP, "fsdp2-efficient": EFFICIENT}
    cases = [case(f"{way}-{m}", m, 2, environment) for way, environment in ways.items() for m in METHODS]
    cases += [case("up", "graphlora", 2, FSDP, resume=True), case("down", "graphlora", 2, FSDP, **half)]
    cases += [case("two_adam", "graphlora", 2, FSDP, **adam)]
    two = start(cases, folder / "seen2", 2)
    _say("one process again")
    down = start([case("down", "graphlora", 1, {}, resume=True)], folder / "seen3", 1)["down"]

    pairs = {name: (f"one-{name.rpartition('-')[2]}", two[name][0]) for name in two if "-" in name}
    found = {
        name: _differences(one[base][0], run, folder / base, folder / name)
        for name, (base, run) in pairs.items()
    }
    equal = all(first["checksum"] == second["checksum"] for first, second in two.values())
    resumed = {
        name: _differences(one["one-graphlora"][0], run, folder / "one-graphlora", folder / name)
        for name, run in (("up", two["up"][0]), ("down", down[0]))
    }
    under_adam = _differences(
        one["one_adam"][0], two["two_adam"][0], folder / "one_adam", folder / "two_adam"
    )
    return _write(found, resumed, under_adam, equal, steps)


def _differences(one: dict[str, Any], other: dict[str, Any], *folders: Path) -> dict[str, float]:
    """Largest relative difference of a step's loss; largest one of a tensor's entry, relative to its largest entry."""
    losses = [abs(a - b) / abs(a) for a, b in zip(one["losses"], other["losses"], strict=True)]
    first, second = (load_file(folder / "adapter_model.safetensors") for folder in folders)
    scales = {name: max(1.0, float(value.abs().max())) for name, value in first.items()}
    weights = [float((first[name] - second[name]).abs().max()) / scales[name] for name in first]
    return {"loss": max(losses), "weight": max(weights)}


def _write(
    found: dict[str, Any], resumed: dict[str, Any], under_adam: dict[str, float], equal: bool, steps: int
) -> int:
    largest = {kind: max(values[kind] for values in found.values()) for kind in ("loss", "weight")}
    state = "adapters of both processes bitwise equal" if equal else "adapters of the processes DIFFER"
    write_record(
        "two_processes",
        "Two processes (DDP or FSDP2) learn what one process learns from the same rows, of equal or unequal length.",
        TEST,
        f"{len(found)} runs of {steps} steps against one process: largest difference of a loss {largest['loss']:.1e} "
        f"(relative), of a weight {largest['weight']:.1e}; {state}",
        {"runs": found, "under_adam": under_adam, "state_equal": equal, "steps": steps},
    )
    again = {kind: max(values[kind] for values in resumed.values()) for kind in ("loss", "weight")}
    write_record(
        "resume_other_processes",
        "A run goes on with another number of processes where it stopped, with the same rows per step.",
        TEST.replace("two_processes_learn_what_one_learns", "a_run_goes_on_with_another_number_of_processes"),
        f"1 to 2 and 2 to 1 at step {steps // 2} of {steps}: largest difference of a loss {again['loss']:.1e} "
        f"(relative), of a weight {again['weight']:.1e}",
        {"runs": resumed, "steps": steps},
    )
    _say(f"{largest} {again} equal={equal}")
    return 0 if equal and max(largest["loss"], again["loss"]) < 1e-4 else 1


def _say(text: str) -> None:
    sys.stderr.write(f"{text}\n")


if __name__ == "__main__":
    sys.exit(main())
