"""The same seed gives the same adapter: every path trained in two processes of its own and compared bit for bit.

`python -m reliability.repeatable` takes a few minutes on a CPU. On a GPU, `--device cuda` adds the Triton kernels,
recorded steps and deterministic mode. `--model PATH ...` takes models of other sizes, in bfloat16. Every process
compiles into folders of its own: what one found by timing is not there for the next.
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
from concurrent.futures import ThreadPoolExecutor
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
PROMISE_GPU = (
    "The same seed gives the same adapter and the same losses, bit for bit, in another process on one GPU, for every "
    "backend and step mode, the Triton kernels, recorded and compiled steps among them, and with deterministic mode."
)
PROMISE_MODELS = "The same on one GPU for models of other sizes, in bfloat16."
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
    "launched steps": {"step_mode": "eager"},
    "Triton kernels": {"backend": "triton"},
    "recorded steps": {"backend": "triton", "step_mode": "graph"},
    "compiled and recorded steps": {"step_mode": "compiled_graph"},
    "compiled steps with packing": {"step_mode": "compile", "packing": True},
    "compiled steps in deterministic mode": {"step_mode": "compile", "deterministic": True},
}
# What `--model` changes, so that kernels have work: 16 rows at a time and bfloat16.
AT_SIZE: dict[str, Any] = {
    "dtype": "bfloat16",
    "per_device_train_batch_size": 16,
    "gradient_accumulation_steps": 1,
}
DETERMINISTIC: dict[str, dict[str, Any]] = {"deterministic mode": {"deterministic": True}}
# Each must give what "plain" gives. Deterministic mode only on a CPU: PyTorch takes other kernels for it on a GPU.
SAME_AS_PLAIN: dict[str, dict[str, Any]] = {
    "two data loader workers": {"training_args": {"dataloader_num_workers": 2}}
}


def main() -> int:
    """Trains everything twice and writes the record."""
    parser = argparse.ArgumentParser(prog="python -m reliability.repeatable", description=__doc__)
    parser.add_argument("--count", type=int, default=2, help="processes per path")
    parser.add_argument("--steps", type=int, default=20, help="optimizer steps of a run")
    parser.add_argument("--device", choices=["cpu", "cuda"], default="cpu")
    parser.add_argument("--model", nargs="+", default=[], help="base models; left out: a tiny random one")
    parser.add_argument("--paths", nargs="*", help="only these paths")
    parser.add_argument("--workers", type=int, default=1, help="processes at a time")
    options = parser.parse_args()
    folder = Path(tempfile.mkdtemp())
    paths: dict[str, dict[str, Any]] = {}
    try:
        for model in options.model or [None]:
            name = "tiny" if model is None else Path(model).name
            (folder / name).mkdir()
            device, found = _measure(options, folder / name, model)
            paths |= found if model is None else {f"{name}: {path}": value for path, value in found.items()}
    except GraphLoraError as error:
        sys.stderr.write(f"reliability: error: {error}\n")
        return 2
    finally:
        shutil.rmtree(folder, ignore_errors=True)
    equal = sum(path["equal"] for path in paths.values())
    figure = f"{equal} of {len(paths)} paths equal in {options.count} processes, {options.steps} steps each"
    if options.model:
        figure += " of " + ", ".join(Path(model).name for model in options.model)
    print(figure)
    name, promise, machine = "repeatable", PROMISE, None
    if options.device == "cuda":
        name, promise, machine = "repeatable_gpu", PROMISE_GPU, device
    if options.model:
        name, promise = f"{name}_models", PROMISE_MODELS
    values = {"paths": paths, "steps": options.steps, "device": device}
    print(write_record(name, promise, TEST, figure, values, machine=machine))
    return 0 if equal == len(paths) else 1


def _measure(
    options: argparse.Namespace, folder: Path, model: str | None
) -> tuple[str, dict[str, dict[str, Any]]]:
    """The device, and of each path the hash of its bits and whether all processes had them."""
    on_gpu = options.device == "cuda"
    alone = PATHS | (ON_GPU | DETERMINISTIC if on_gpu else {})
    same = SAME_AS_PLAIN | ({} if on_gpu else DETERMINISTIC)
    wanted = [
        name for name in (*alone, *same) if not options.paths or name in options.paths or name == "plain"
    ]
    values = _values(folder, options, model)
    paths: dict[str, dict[str, Any]] = {}
    device = ""

    def attempt(name: str, number: int) -> dict[str, Any]:
        return _train(folder / f"{name} {number}", values, (alone | same)[name])

    with ThreadPoolExecutor(options.workers) as pool:
        waiting = {
            name: [pool.submit(attempt, name, number) for number in range(options.count)] for name in wanted
        }
        for name in wanted:
            records = [future.result() for future in waiting[name]]
            device = records[0]["device"]
            digests = [
                _digest(folder / f"{name} {number}" / WEIGHTS, record)
                for number, record in enumerate(records)
            ]
            expected = digests[0] if name in alone else paths["plain"]["digest"]
            equal = all(digest == expected for digest in digests)
            paths[name] = {"digest": digests[0], "equal": equal}
            print(f"{name}: {'equal' if equal else 'DIFFERENT'}", flush=True)
    return device, paths


def _values(folder: Path, options: argparse.Namespace, model: str | None) -> dict[str, Any]:
    """The recipe that all paths start from."""
    values = recipe(folder) | {"max_steps": options.steps, "eval_steps": options.steps}
    values["training_args"] |= {"use_cpu": options.device == "cpu"}
    return values if model is None else values | {"model": model} | AT_SIZE


def _train(output: Path, values: dict[str, Any], changes: dict[str, Any]) -> dict[str, Any]:
    """Trains in a process of its own; its record."""
    arguments = values["training_args"] | changes.get("training_args", {})
    values = values | changes | {"training_args": arguments, "output_dir": str(output)}
    config = output.with_suffix(".yaml")
    config.write_text(yaml.safe_dump({name: value for name, value in values.items() if value is not None}))
    words = [sys.executable, "-W", "ignore", "-m", "graphlora.cli", "train", "--config", str(config)]
    with tempfile.TemporaryDirectory() as caches:
        environment = os.environ | {
            "HF_HUB_OFFLINE": "1",
            "TOKENIZERS_PARALLELISM": "false",
            "TORCHINDUCTOR_CACHE_DIR": f"{caches}/inductor",
            "TRITON_CACHE_DIR": f"{caches}/triton",
        }
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
