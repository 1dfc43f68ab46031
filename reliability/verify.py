"""`graphlora verify` against damage: random bits flipped one at a time, another base, another process."""

from __future__ import annotations

import argparse
import contextlib
import io
import json
import os
import random
import shutil
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any

from safetensors.torch import load_file, save_file

from graphlora.cli.main import main as graphlora
from graphlora.training.manifest import HASHED
from reliability.record import write_record
from reliability.tiny import recipe

PROMISE = (
    "`graphlora verify` finds every changed bit of an adapter's files and another base model, and reproduces the "
    "recorded output in another process."
)
TEST = "tests/cli/test_verify.py"
STATES = ("exact", "within tolerance", "different", "CHANGED")


def main() -> int:
    """Trains an adapter, tampers with copies of it, and writes the record."""
    parser = argparse.ArgumentParser(prog="python -m reliability.verify", description=__doc__)
    parser.add_argument("--count", type=int, default=1000, help="bits to flip")
    parser.add_argument("--seed", type=int, default=0, help="seed of their places")
    options = parser.parse_args()
    folder = Path(tempfile.mkdtemp())
    try:
        adapter = _trained(folder)
        found = {
            "flipped_bits": options.count,
            "found_bits": _flips(adapter, options.count, options.seed),
            "output_by_threads": {threads: _in_another_process(adapter, threads) for threads in (1, 2)},
            "output_on_other_base": _on_other_base(adapter, folder),
        }
    finally:
        shutil.rmtree(folder, ignore_errors=True)
    same = found["output_by_threads"]
    figure = (
        f"{found['found_bits']} of {options.count} flipped bits found; output in another process: "
        f"{same[1]} (1 thread), {same[2]} (2 threads); another base: {found['output_on_other_base']}"
    )
    print(figure)
    print(write_record("verify", PROMISE, TEST, figure, found))
    good = found["found_bits"] == options.count and same[1] == "exact" and same[2] in STATES[:2]
    return 0 if good and found["output_on_other_base"] in STATES[2:] else 1


def _trained(folder: Path) -> Path:
    """A trained adapter."""
    values = recipe(folder)
    words = [
        "train",
        "--model",
        values["model"],
        "--task",
        values["task"],
        "--output_dir",
        str(folder / "adapter"),
    ]
    assert graphlora([*words, "--max_steps", "4", "--num_experts", "4", "--dtype", "float32"]) == 0
    return folder / "adapter"


def _flips(adapter: Path, count: int, seed: int) -> int:
    """How many of so many flipped bits `verify` finds, one at a time."""
    draw = random.Random(seed)
    found = 0
    for number in range(count):
        path = adapter / draw.choice(HASHED)
        whole = path.read_bytes()
        changed = bytearray(whole)
        changed[draw.randrange(len(whole))] ^= 1 << draw.randrange(8)
        path.write_bytes(bytes(changed))
        with contextlib.redirect_stdout(io.StringIO()) as said:
            code = graphlora(["verify", str(adapter), "--json"])
        found += code == 1 and json.loads(said.getvalue())["files"][path.name] == "changed"
        path.write_bytes(whole)
        if (number + 1) % 100 == 0:
            print(f"{number + 1} bits flipped, {found} found", flush=True)
    return found


def _in_another_process(adapter: Path, threads: int, *words: str) -> str:
    """State of the output that another process finds."""
    program = [
        sys.executable,
        "-W",
        "ignore",
        "-m",
        "graphlora.cli",
        "verify",
        str(adapter),
        "--json",
        *words,
    ]
    environment = os.environ | {"OMP_NUM_THREADS": str(threads), "CUDA_VISIBLE_DEVICES": ""}
    said: Any = json.loads(subprocess.run(program, capture_output=True, text=True, env=environment).stdout)
    return said["output"]["state"]


def _on_other_base(adapter: Path, folder: Path) -> str:
    """State of the output on a base of which a tenth of the weights moved a little."""
    other = shutil.copytree(folder / "model", folder / "other")
    weights = load_file(other / "model.safetensors")
    for value in weights.values():
        value.view(-1)[::10] += 1e-4
    save_file(weights, other / "model.safetensors", {"format": "pt"})
    return _in_another_process(adapter, 1, "--base_model", str(other))


if __name__ == "__main__":
    sys.exit(main())
