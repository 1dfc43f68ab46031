"""Runs of `graphlora.training.train` in processes of their own, and data for them."""

from __future__ import annotations

import json
import os
import random
import socket
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parent.parent
SUPPORT = ROOT / "tests" / "support"
FSDP = {
    "ACCELERATE_USE_FSDP": "true",
    "FSDP_VERSION": "2",
    "FSDP_AUTO_WRAP_POLICY": "TRANSFORMER_BASED_WRAP",
    "FSDP_STATE_DICT_TYPE": "FULL_STATE_DICT",
}
EFFICIENT = FSDP | {"FSDP_CPU_RAM_EFFICIENT_LOADING": "true"}


def launch(words: Sequence[str | Path], count: int, timeout: float | None = None) -> list[str]:
    """Run Python with these words in `count` processes that find each other as under torchrun; their outputs.

    Args:
        words: Script and its arguments, the same for all.
        count: Number of processes, all on the CPU.
        timeout: Seconds until the first must have ended.

    Raises:
        RuntimeError: A process failed; holds the end of its output.
        subprocess.TimeoutExpired: They take longer.
    """
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    shared = {**os.environ, "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port), "OMP_NUM_THREADS": "1"}
    shared |= {"WORLD_SIZE": str(count), "LOCAL_WORLD_SIZE": str(count), "CUDA_VISIBLE_DEVICES": ""}
    shared |= {"PYTHONPATH": os.pathsep.join(path for path in sys.path if path)}
    processes = [
        subprocess.Popen(
            [sys.executable, *map(str, words)],
            env={**shared, "RANK": str(rank), "LOCAL_RANK": str(rank)},
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
        )
        for rank in range(count)
    ]
    try:
        outputs = [process.communicate(timeout=timeout)[0] for process in processes]
    finally:
        for process in processes:
            process.kill()
    for process, output in zip(processes, outputs, strict=True):
        if process.returncode:
            raise RuntimeError(output[-6000:])
    return outputs


def start(
    cases: list[dict[str, Any]], folder: Path, count: int, timeout: float | None = None
) -> dict[str, list[dict[str, Any]]]:
    """Run cases (see `tests/support/launched.py`) in `count` processes; what each rank saw, by case.

    Raises:
        RuntimeError: A process failed; holds the end of its output.
        subprocess.TimeoutExpired: They take longer than so many seconds.
    """
    folder.mkdir(parents=True, exist_ok=True)
    listed = folder / "cases.json"
    listed.write_text(json.dumps(cases))
    launch([SUPPORT / "launched.py", listed, folder], count, timeout)
    return {
        case["name"]: [
            json.loads((folder / f"{case['name']}.{rank}.json").read_text()) for rank in range(count)
        ]
        for case in cases
    }


def make_rows(path: Path, count: int, lengths: tuple[int, int]) -> Path:
    """Rows of random digits; their completions have as many as the range says, so as many tokens."""
    draw = random.Random(0)

    def digits(number: int) -> str:
        return "".join(str(draw.randrange(10)) for _ in range(number))

    rows = [{"prompt": digits(4), "completion": digits(draw.randint(*lengths))} for _ in range(count)]
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return path
