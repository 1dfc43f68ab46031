"""A run over streamed data, killed again and again in the middle of its epochs, against one that was left alone.

    python -m reliability.stream_resume --count 10

Each time a real process is started with `resume`, and killed with SIGKILL at a random moment of its training; the last
one runs to its end. The weights are compared bit for bit with those of an undisturbed run.
"""

from __future__ import annotations

import argparse
import json
import random
import signal
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

from reliability.record import write_record
from reliability.streaming import tiny_model, write_numbers

ROWS = 600
STEPS = 120
SAVE_STEPS = 5
PROMISE = (
    "A run over streamed data that is killed in the middle of an epoch goes on at its place in the data, and ends "
    "with the same weights as an undisturbed one."
)
TEST = (
    "tests/training/test_streaming.py::"
    "test_a_killed_run_goes_on_in_the_middle_of_an_epoch_as_if_it_had_not_been"
)
CHILD = """
import sys
from pathlib import Path
import torch
from transformers import TrainerCallback
from graphlora.training import Recipe, train
from graphlora.training.workbench import Workbench

class Started(TrainerCallback):
    def on_step_end(self, args, state, control, **kwargs):
        Path(sys.argv[2]).write_text(str(state.global_step))

class Bench(Workbench):
    quiet = True
    def callbacks(self, trainer):
        return [Started()]

torch.set_num_threads(1)
train(Recipe.from_yaml(sys.argv[1]), resume=True, workbench=Bench())
"""


def main() -> None:
    """Run at full size and write the record."""
    parser = argparse.ArgumentParser(
        prog="python -m reliability.stream_resume", description=__doc__.split("\n")[0]
    )
    parser.add_argument("--count", type=int, default=10, help="kills")
    parser.add_argument("--seed", type=int, default=0, help="seed of the moments")
    options = parser.parse_args()
    with tempfile.TemporaryDirectory(prefix="graphlora-resume-") as folder:
        values = measure(Path(folder), options.count, options.seed)
    figure = (
        f"{values['kills']} kills, all resumed, {values['rows_per_pass']:,} rows per pass; "
        f"{values['tensors_that_differ']} of {values['tensors']} weight tensors differ"
    )
    sys.stdout.write(f"{write_record('stream_resume', PROMISE, TEST, figure, values)}\n{figure}\n")


def measure(folder: Path, kills: int, seed: int) -> dict[str, Any]:
    """Kill so many times and compare.

    Args:
        folder: Place for data and runs.
        kills: How often.
        seed: Seed of the moments.

    Returns:
        Kills, the step that each came at, how many runs went on, and weight tensors that differ.
    """
    from safetensors.torch import load_file

    model, data = tiny_model(folder / "model"), write_numbers(folder / "numbers.jsonl", ROWS)
    draw = random.Random(seed)
    alone, killed = (_recipe(folder, model, data, name) for name in ("alone", "killed"))
    _finish(alone, folder)
    steps = []
    while len(steps) < kills:
        step = _kill(killed, folder, draw)
        if step is None:
            raise SystemExit(f"the run ended after {len(steps)} kills; give fewer")
        steps.append(step)
        sys.stderr.write(f"kill {len(steps)} of {kills} at step {step}\n")
    _finish(killed, folder)
    one, other = (load_file(folder / name / "adapter_model.safetensors") for name in ("alone", "killed"))
    differ = sum(not value.equal(other[name]) for name, value in one.items())
    losses = [_losses(folder / name) for name in ("alone", "killed")]
    return {
        "kills": len(steps),
        "steps_of_kills": steps,
        "steps_between_checkpoints": SAVE_STEPS,
        "steps": STEPS,
        "rows_per_pass": ROWS,
        "rows_per_step": 8,
        "tensors": len(one),
        "tensors_that_differ": differ + len(set(one) ^ set(other)),
        "equal_losses": losses[0] == losses[1],
    }


def _recipe(folder: Path, model: Path, data: Path, name: str) -> Path:
    from graphlora.training import Recipe

    recipe = Recipe.from_dict(
        {
            "model": str(model), "task": str(data), "output_dir": str(folder / name), "streaming": True,
            "shuffle_buffer_size": 100, "method": "graphlora", "num_experts": 4, "r": 2, "router_hidden_size": 16,
            "lora_dropout": 0.1, "dtype": "float32", "max_steps": STEPS, "per_device_train_batch_size": 4,
            "gradient_accumulation_steps": 2, "packing": True, "eval_strategy": "no", "save_steps": SAVE_STEPS,
            "logging_steps": 1, "learning_rate": 5e-3,
            "training_args": {"use_cpu": True, "disable_tqdm": True, "dataloader_num_workers": 1},
        }
    )  # fmt: skip
    path = folder / f"{name}.yaml"
    path.write_text(recipe.to_yaml(), encoding="utf-8")
    return path


def _start(recipe: Path, mark: Path, log: Any) -> subprocess.Popen[bytes]:
    mark.unlink(missing_ok=True)
    command = [sys.executable, "-W", "ignore", "-c", CHILD, str(recipe), str(mark)]
    return subprocess.Popen(command, stdout=log, stderr=log)


def _kill(recipe: Path, folder: Path, draw: random.Random) -> int | None:
    """Kill a run at a random moment, some steps after its first; the last step, or `None` where it ended before."""
    mark = folder / "step"
    with (folder / "log").open("wb") as log:
        run = _start(recipe, mark, log)
        first = _wait(run, mark, 1, folder)
        last = _wait(run, mark, min(first + draw.randint(0, 14), STEPS - 2), folder)
        time.sleep(draw.uniform(0, 0.2))
        if run.poll() is not None:
            return None
        run.send_signal(signal.SIGKILL)
        run.wait()
    return int(mark.read_text() or last)


def _wait(run: subprocess.Popen[bytes], mark: Path, step: int, folder: Path) -> int:
    """Wait until a run has done a step; the step it has done."""
    while True:
        text = mark.read_text() if mark.is_file() else ""
        if text and int(text) >= step:
            return int(text)
        if run.poll() not in (None, 0):
            raise SystemExit(f"the run failed:\n{(folder / 'log').read_text()[-2000:]}")
        if run.poll() == 0:
            return STEPS
        time.sleep(0.005)


def _finish(recipe: Path, folder: Path) -> None:
    with (folder / "log").open("wb") as log:
        run = _start(recipe, folder / "step", log)
        if run.wait() != 0:
            raise SystemExit(f"the run failed:\n{(folder / 'log').read_text()[-2000:]}")


def _losses(run: Path) -> list[float]:
    last = max((run / "checkpoints").glob("checkpoint-*"), key=lambda path: int(path.name.split("-")[1]))
    history = json.loads((last / "trainer_state.json").read_text())["log_history"]
    return [entry["loss"] for entry in history if "loss" in entry]


if __name__ == "__main__":
    main()
