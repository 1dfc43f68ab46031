"""How long a study will take and how much memory: from records of like runs where there are any, else by a rule."""

from __future__ import annotations

import json
import re
from collections import defaultdict
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from statistics import median
from typing import Any

from graphlora.records import RunRecord
from graphlora.study.plan import Run
from graphlora.study.spec import BASE

RULE = (
    "6 operations per parameter and token for training, 2 for scoring, 60 tokens per row, 2,000 rows per split "
    "(or its limit), at 60 TFLOP/s on a GPU and 0.03 on a CPU, and 5 s per run and 0.1 s per step; memory: 2 bytes "
    "per parameter (4 on a CPU), and 40 bytes per layer, token of a batch and hidden value"
)
TOKENS_PER_ROW, ROWS, PER_RUN, PER_STEP = 60, 2000, 5.0, 0.1
GPU_SPEED, CPU_SPEED = 60e12, 0.03e12
BYTES_PER_VALUE = 40
UNKNOWN_PARAMETERS = 1e9


@dataclass(frozen=True)
class Estimate:
    """Cost of one run.

    Attributes:
        seconds: Time.
        memory: Peak memory in bytes; `None` where nothing tells it.
        source: `"records"` or `"rule"`.
        device: Where it takes that long: the records' device, or what the rule stands for.
    """

    seconds: float
    memory: float | None
    source: str
    device: str


class Estimator:
    """Costs of runs, from the records of the same study where they exist."""

    def __init__(self, runs: Sequence[Run], records: dict[str, RunRecord], on_gpu: bool) -> None:
        self._on_gpu = on_gpu
        self._times: dict[tuple[str, ...], list[tuple[float, float | None, str]]] = defaultdict(list)
        for run in runs:
            record = records.get(run.run_id)
            if record is not None and record.wall_time is not None:
                memory = record.metrics.get("peak_reserved") or record.peak_memory
                device = _device(record.device)
                for key in _keys(run):
                    self._times[key].append((record.wall_time, memory, device))

    def __call__(self, run: Run) -> Estimate:
        """Cost of a run: that of like runs (same variant; else any variant) on the same model and task."""
        for key in _keys(run):
            if found := self._times.get(key):
                times, memories, devices = zip(*found, strict=True)
                memory = max((each for each in memories if each is not None), default=None)
                return Estimate(median(times), memory, "records", " or ".join(sorted(set(devices))))
        return self._by_rule(run)

    def _by_rule(self, run: Run) -> Estimate:
        size = model_size(str(run.options["model"]))
        recipe = run.recipe()
        speed = GPU_SPEED if self._on_gpu else CPU_SPEED
        tested = (run.test_limit or ROWS) if run.evaluate == "test" or run.variant == BASE else 0
        tokens = tested * TOKENS_PER_ROW
        work = 2.0 * size.parameters * tokens
        rows = recipe.per_device_train_batch_size * recipe.gradient_accumulation_steps
        steps: float = 0
        if run.variant != BASE:
            per_epoch = (recipe.train_limit or ROWS) / rows
            steps = recipe.max_steps if recipe.max_steps > 0 else recipe.num_train_epochs * per_epoch
            work += 6.0 * size.parameters * steps * rows * TOKENS_PER_ROW
            times = 1 / recipe.eval_steps if recipe.eval_steps < 1 else steps / recipe.eval_steps
            if recipe.eval_strategy == "epoch":
                times = recipe.num_train_epochs
            scored = (recipe.eval_limit or ROWS) * TOKENS_PER_ROW if recipe.eval_strategy != "no" else 0
            work += 2.0 * size.parameters * times * scored
        batch = recipe.per_device_train_batch_size * (recipe.max_length or 2 * TOKENS_PER_ROW)
        memory = size.parameters * (2 if self._on_gpu else 4) + BYTES_PER_VALUE * batch * size.layer_values
        device = f"a {'GPU' if self._on_gpu else 'CPU'} of this machine"
        return Estimate(PER_RUN + PER_STEP * steps + work / speed, memory, "rule", device)


@dataclass(frozen=True)
class ModelSize:
    """Parameters of a model, and its hidden values per token over all layers."""

    parameters: float
    layer_values: float


def model_size(name: str) -> ModelSize:
    """Size of a model from its files, else from its name (`8B`), else a billion."""
    path = Path(name)
    config: dict[str, Any] = {}
    if (path / "config.json").is_file():
        config = json.loads((path / "config.json").read_text(encoding="utf-8"))
    values = float(config.get("hidden_size", 0) * config.get("num_hidden_layers", 0))
    stored = sum(file.stat().st_size for file in path.glob("*.safetensors")) if path.is_dir() else 0
    if stored:
        width = 4 if str(config.get("dtype", config.get("torch_dtype"))) == "float32" else 2
        return ModelSize(stored / width, values)
    found = re.search(r"(\d+(?:\.\d+)?)\s*([BM])\b", path.name, re.IGNORECASE)
    parameters = UNKNOWN_PARAMETERS
    if found:
        parameters = float(found.group(1)) * (1e9 if found.group(2).upper() == "B" else 1e6)
    return ModelSize(parameters, values or 1.5 * parameters**0.5)


def _device(name: str | None) -> str:
    """How a record's device is said."""
    return "a CPU" if name is None or name == "cpu" else name


def _keys(run: Run) -> list[tuple[str, ...]]:
    """From the most to the least alike."""
    if run.variant == BASE:
        return [(run.model, run.task, BASE)]
    return [(run.model, run.task, "", run.variant), (run.model, run.task, "")]
