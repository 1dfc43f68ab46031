"""A run whose machine has too little memory: a real failed allocation, the line it ends in, and a setting of that line.

The address space of the process is limited (RLIMIT_AS) once the libraries are loaded. Then the setting with a smaller
batch is tried under the same limit.
"""

from __future__ import annotations

import re
import subprocess
import sys
import tempfile
from pathlib import Path

import yaml

from reliability.record import write_record
from reliability.tiny import make_model, make_texts

PROMISE = (
    "Memory that runs out, on a GPU or the host, ends in one line that names the settings to change and how many GB "
    "each is predicted to save."
)
LIMIT = 400 * 2**20
SCRIPT = """
import resource, sys
import graphlora.training.run
from graphlora.cli.main import main
pages = int(open("/proc/self/statm").read().split()[0])
resource.setrlimit(resource.RLIMIT_AS, (pages * resource.getpagesize() + {limit}, resource.RLIM_INFINITY))
sys.exit(main(["train", *sys.argv[1:]]))
"""


def make_recipe(folder: Path) -> Path:
    """A recipe whose step takes more than the limit; with an eighth of the rows per batch, less."""
    values = {
        "model": str(make_model(folder / "model", hidden_size=128, layers=4, window=512)),
        "task": str(make_texts(folder / "texts.jsonl", rows=64, words=300)),
        "output_dir": str(folder / "out"),
        "dtype": "float32",
        "num_experts": 4,
        "train_on": "all",
        "eval_strategy": "no",
        "max_steps": 1,
        "per_device_train_batch_size": 32,
        "training_args": {"use_cpu": True, "disable_tqdm": True},
    }
    path = folder / "recipe.yaml"
    path.write_text(yaml.safe_dump(values))
    return path


def train_limited(recipe: Path, *words: str) -> subprocess.CompletedProcess[str]:
    """`graphlora train` with little more address space than its libraries take."""
    script = SCRIPT.format(limit=LIMIT)
    command = [sys.executable, "-W", "ignore", "-c", script, "--config", str(recipe), *words]
    return subprocess.run(command, capture_output=True, text=True)


def main() -> None:
    """Fail, read the line, follow it, record."""
    with tempfile.TemporaryDirectory() as name:
        recipe = make_recipe(Path(name))
        failed = train_limited(recipe)
        line = failed.stderr.strip().splitlines()[-1]
        small = ["--per_device_train_batch_size", "4", "--gradient_accumulation_steps", "8", "--overwrite"]
        followed = train_limited(recipe, *small)
    savings = dict(re.findall(r"(?:set|or) (\w+) to [^(]*\(about ([\d.]+) GB less\)", line))
    if failed.returncode != 2 or not savings or followed.returncode != 0:
        raise SystemExit(f"the promise does not hold: {line}\n{followed.stderr[-1000:]}")
    print(line)
    write_record(
        "out_of_memory",
        PROMISE,
        "tests/reliability/test_out_of_memory.py::test_a_failed_allocation_ends_in_settings_that_help",
        f"one line with {len(savings)} settings and their GB; a smaller batch then trains under the same limit",
        {"limit_bytes": LIMIT, "predicted_gb_saved": {k: float(v) for k, v in savings.items()}, "line": line},
    )


if __name__ == "__main__":
    main()
