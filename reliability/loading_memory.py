"""Under FSDP2 one process reads the weights of the base: host memory of both processes, with and without.

Run as `python -m reliability.loading_memory [--width 2048]`, with a random base of almost a gigabyte in float32. It is
loaded as it is, which maps the file into memory, and as bfloat16, which makes a copy. On a CPU the shards stay in host
memory too, half of the base in each process; on GPUs they do not.
"""

from __future__ import annotations

import argparse
import sys
import tempfile
from pathlib import Path
from typing import Any

from reliability.launching import EFFICIENT, FSDP, make_rows, start
from reliability.record import write_record
from reliability.tiny import make_model

MB = 1e6


def main() -> int:
    """Measure and write the record; 1 where the second process holds more than its part and one layer or so."""
    parser = argparse.ArgumentParser(prog="python -m reliability.loading_memory", description=__doc__)
    parser.add_argument("--width", type=int, default=2048, help="hidden size of the base")
    width = parser.parse_args().width
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        tiny = make_model(folder / "tiny")
        large = make_model(folder / "large", hidden_size=width, layers=6)
        rows = make_rows(folder / "rows.jsonl", 40, (5, 5))
        size = (large / "model.safetensors").stat().st_size

        def peaks(name: str, model: Path, dtype: str, environment: dict[str, str]) -> list[float]:
            recipe: dict[str, Any] = {
                "model": str(model),
                "task": str(rows),
                "output_dir": str(folder / name),
            }
            recipe |= {"method": "graphlora", "num_experts": 2, "top_k": 1, "r": 2, "router_hidden_size": 8}
            recipe |= {"dtype": dtype, "per_device_train_batch_size": 1, "max_steps": 1}
            recipe |= {"eval_strategy": "no", "training_args": {"use_cpu": True, "disable_tqdm": True}}
            case = {"name": name, "recipe": recipe, "environment": environment}
            seen = start([case], folder / "seen", 2)[name]
            return [rank["peak_memory"] / MB for rank in seen]

        empty = peaks("empty", tiny, "float32", EFFICIENT)
        found = {
            f"{dtype}, {way}": peaks(f"{dtype} {way}", large, dtype, environment)
            for dtype in ("float32", "bfloat16")
            for way, environment in (("every process reads", FSDP), ("one reads", EFFICIENT))
        }
    extra = {
        way: [peak - base for peak, base in zip(values, empty, strict=True)] for way, values in found.items()
    }
    return _write(size, extra)


def _write(size: int, extra: dict[str, list[float]]) -> int:
    text = "; ".join(f"{way}: {values[0]:.0f} and {values[1]:.0f} MB" for way, values in extra.items())
    write_record(
        "loading_memory",
        "Under FSDP2 no process holds a whole copy of the base beside its own part of it.",
        "tests/training/test_processes.py::test_one_process_reads_the_weights_and_nothing_changes",
        f"base of {size / MB:.0f} MB in float32, sharded over two processes; peak of host memory above a tiny run, "
        f"with the half that stays there on a CPU, and a training step: {text}",
        {"base_mb": size / MB, "above_a_tiny_run_mb": extra},
    )
    sys.stderr.write(f"{size / MB:.0f} MB: {extra}\n")
    return 0 if max(extra["float32, one reads"]) < 0.8 * size / MB else 1


if __name__ == "__main__":
    sys.exit(main())
