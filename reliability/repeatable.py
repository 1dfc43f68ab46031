"""The same seed gives the same adapter: every path trained in two processes of its own and compared bit for bit.

`python -m reliability.repeatable` takes a few minutes on a CPU. On a GPU, `--device cuda` adds the Triton kernels and
recorded steps, and `--model PATH` takes a real model.
"""

from __future__ import annotations

import argparse
import hashlib
import json
import os
import shutil
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any

import yaml

from graphlora.errors import GraphLoraError
from reliability.record import write_record
from reliability.tiny import WEIGHTS, recipe

PROMISE = (
    "The same seed gives the same adapter and the same losses, bit for bit, in another process on one device, for "
    "every backend, step mode and form of batches; neither data loader workers nor deterministic mode change a bit."
)
TEST = "tests/training/test_determinism.py"
LORA: dict[str, Any] = {
    "method": "lora",
    "num_experts": None,
    "router_hidden_size": None,
    "load_window": None,
}
PATHS: dict[str, dict[str, Any]] = {
    "plain": {},
    "eager backend": {"backend": "eager"},
    "plain LoRA": LORA,
    "packing": {"packing": True},
    "rows by length": {"train_sampling_strategy": "group_by_length"},
    "activation checkpointing": {"gradient_checkpointing": True},
    "bfloat16": {"dtype": "bfloat16"},
    "learned edges": {"edge_init": "learned"},
    "compiled steps": {"step_mode": "compile"},
}
ON_GPU: dict[str, dict[str, Any]] = {
    "Triton kernels": {"backend": "triton"},
    "recorded steps": {"backend": "triton", "step_mode": "graph"},
}
# Each must give what "plain" gives.
SAME_AS_PLAIN: dict[str, dict[str, Any]] = {
    "deterministic mode": {"deterministic": True},
    "two data loader workers": {"training_args": {"dataloader_num_workers": 2}},
}


def main() -> int:
    """Trains everything twice and writes the record."""
    parser = argparse.ArgumentParser(prog="python -m reliability.repeatable", description=__doc__)
    parser.add_argument("--count", type=int, default=2, help="processes per path")
    parser.add_argument("--steps", type=int, default=20, help="optimizer steps of a run")
    parser.add_argument("--device", choices=["cpu", "cuda"], default="cpu")
    parser.add_argument("--model", help="base model; left out: a tiny random one")
    parser.add_argument("--paths", nargs="*", help="only these paths")
    options = parser.parse_args()
    folder = Path(tempfile.mkdtemp())
    try:
        found = _measure(options, folder)
    except GraphLoraError as error:
        sys.stderr.write(f"reliability: error: {error}\n")
        return 2
    finally:
        shutil.rmtree(folder, ignore_errors=True)
    equal = sum(path["equal"] for path in found["paths"].values())
    num = len(found["paths"])
    figure = f"{equal} of {num} paths equal in {options.count} processes, {found['steps']} steps each"
    print(figure)
    name = "repeatable" if options.device == "cpu" else "repeatable_gpu"
    machine = None if options.device == "cpu" else found["device"]
    print(write_record(name, PROMISE, TEST, figure, found, machine=machine))
    return 0 if equal == num else 1


def _measure(options: argparse.Namespace, folder: Path) -> dict[str, Any]:
    alone = PATHS | (ON_GPU if options.device == "cuda" else {})
    wanted = [
        name
        for name in (*alone, *SAME_AS_PLAIN)
        if not options.paths or name in options.paths or name == "plain"
    ]
    paths: dict[str, dict[str, Any]] = {}
    device = ""
    for name in wanted:
        digests = []
        for attempt in range(options.count):
            output = folder / f"{name} {attempt}"
            changes = alone[name] if name in alone else SAME_AS_PLAIN[name]
            record = _train(folder, output, changes, options)
            device = record["device"]
            digests.append(_digest(output / WEIGHTS, record))
        expected = digests[0] if name in alone else paths["plain"]["digest"]
        paths[name] = {"digest": digests[0], "equal": all(digest == expected for digest in digests)}
        print(f"{name}: {'equal' if paths[name]['equal'] else 'DIFFERENT'}", flush=True)
    return {"paths": paths, "steps": options.steps, "device": device}


def _train(
    folder: Path, output: Path, changes: dict[str, Any], options: argparse.Namespace
) -> dict[str, Any]:
    """Trains in a process of its own; its record."""
    values = recipe(folder) | {
        "max_steps": options.steps,
        "eval_steps": options.steps,
        "output_dir": str(output),
    }
    if options.model is not None:
        values["model"] = options.model
    arguments = (
        values["training_args"] | {"use_cpu": options.device == "cpu"} | changes.get("training_args", {})
    )
    values |= changes | {"training_args": arguments}
    config = folder / "recipe.yaml"
    config.write_text(yaml.safe_dump({name: value for name, value in values.items() if value is not None}))
    words = [sys.executable, "-W", "ignore", "-m", "graphlora.cli", "train", "--config", str(config)]
    environment = os.environ | {"HF_HUB_OFFLINE": "1", "TOKENIZERS_PARALLELISM": "false"}
    done = subprocess.run(words, capture_output=True, text=True, env=environment)
    if done.returncode:
        raise GraphLoraError(f"training failed with {changes}: {done.stderr.strip().splitlines()[-1]}")
    return json.loads((output / "record.json").read_text(encoding="utf-8"))


def _digest(weights: Path, record: dict[str, Any]) -> str:
    """Hash of the adapter's bytes and of the run's losses."""
    losses = [record["metrics"].get(name) for name in ("train_loss", "eval_loss")]
    return hashlib.sha256(weights.read_bytes() + repr(losses).encode()).hexdigest()


if __name__ == "__main__":
    sys.exit(main())
