"""Whole runs of `graphlora train`: what a step takes with its batches, optimizer and bookkeeping around it."""

from __future__ import annotations

import tempfile
import time
from pathlib import Path
from typing import Any, cast

import torch
from tokenizers import Tokenizer
from tokenizers.models import WordLevel
from transformers import PreTrainedModel, PreTrainedTokenizerBase, PreTrainedTokenizerFast, TrainerCallback

from benchmarks.candidates.ffn import compiler_of
from benchmarks.candidates.models import model_config, random_rows
from benchmarks.context import Context
from benchmarks.failures import NotHere, failures
from benchmarks.shapes import SHAPES, Shape
from graphlora.benchmark.random_model import random_model, twin
from graphlora.benchmark.timing import describe_error, release, summarize, synchronize
from graphlora.training import Recipe, train
from graphlora.training.data import Encoded
from graphlora.training.recipe import RECORDED
from graphlora.training.run_data import RunData
from graphlora.training.workbench import Workbench

# How a step runs, by the ending of a candidate's name.
STEP_MODES = {"eager": "eager", "graph": "graph", "compile": "compile", "compiledgraph": "compiled_graph"}
METHODS = {"peft": "lora", "triton": "graphlora", "torch": "graphlora"}
# Steps before the clock runs, in which lengths are met for the first time, and timed blocks of steps after them.
WARM, BLOCKS, BLOCK = 30, 5, 8
ROUNDS = 2


def measure(context: Context) -> None:
    """Trains with every candidate in turn, there and back, on the same base weights and rows.

    `full` is a step in the blocks that are timed, `before` the first run's time until then (loading is not in it,
    compiling and recording are), `last_loss` the mean of the last steps, auxiliary losses included.
    """
    p = context.case.params
    shape = SHAPES[p["shape"]]
    base = random_model(model_config(shape, p["layers"]), context.device, context.dtype)
    steps = (2, 2, 2) if context.tiny else (WARM, BLOCKS, BLOCK)
    made = context.build(p["candidates"], lambda name: _recipe(name, context, steps))
    clocks: dict[str, _Clock] = {}
    for turn in range(ROUNDS):
        for name in list(made)[:: 1 if turn == 0 else -1]:
            clock = clocks.setdefault(name, _Clock(context.device, *steps))
            release(context.device)
            try:
                with tempfile.TemporaryDirectory() as folder:
                    recipe = made[name].changed(output_dir=str(Path(folder) / "run"))
                    clock.results.append(train(recipe, workbench=_Bench(base, shape, p, clock)))
            except failures() as error:
                context.fail(name, describe_error(error))
                del made[name]
    for name in made:
        _report(context, name, clocks[name])


def _report(context: Context, name: str, clock: _Clock) -> None:
    timing = summarize(clock.blocks)
    context.add(name, "full", timing.median, low=timing.low, high=timing.high, iterations=timing.iterations)
    context.add(name, "before", clock.before[0], "s", rounds=clock.before)
    losses = [entry["loss"] for entry in clock.results[0].history if "loss" in entry]
    context.add(name, "last_loss", losses[-1], "nats")
    memory = max(result.record.peak_memory or 0 for result in clock.results)
    if context.device.type == "cuda":
        context.add(name, "peak_memory", float(memory), "bytes")


def _recipe(name: str, context: Context, steps: tuple[int, int, int]) -> Recipe:
    source, _, ending = name.rpartition("_")
    mode = STEP_MODES[ending]
    if mode in RECORDED and context.device.type != "cuda":
        raise NotHere("steps are recorded on a GPU")
    p = context.case.params
    warm, blocks, block = steps
    arguments: dict[str, Any] = {"disable_tqdm": True, "use_cpu": context.device.type == "cpu"}
    if mode in ("compile", "compiled_graph"):
        arguments["torch_compile_backend"] = compiler_of(context.device)
    options: dict[str, Any] = {
        "model": f"random weights of the shape {p['shape']}", "task": "random tokens", "output_dir": "chosen later",
        "method": METHODS[source], "r": p["r"], "dtype": str(context.dtype).removeprefix("torch."),
        "step_mode": mode, "max_steps": warm + blocks * block + 1, "save_steps": 10**6, "eval_strategy": "no",
        "load_best_model_at_end": False, "logging_steps": block, "per_device_train_batch_size": p["batch"],
        "packing": p["packing"], "max_length": p["longest"], "training_args": arguments,
    }  # fmt: skip
    if METHODS[source] == "graphlora":
        options["backend"] = source
    return Recipe.from_dict(options)


class _Clock(TrainerCallback):
    """Times blocks of steps; the device is waited for between them, not within."""

    def __init__(self, device: torch.device, warm: int, blocks: int, block: int) -> None:
        self.device, self.block = device, block
        self._edges = range(warm, warm + blocks * block + 1, block)
        self.blocks: list[float] = []
        self.before: list[float] = []
        self.results: list[Any] = []
        self._last = 0.0

    def on_train_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        """The clock starts."""
        self._last = time.perf_counter()

    def on_step_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        """A block ends and the next begins."""
        if state.global_step not in self._edges:
            return
        synchronize(self.device)
        now = time.perf_counter()
        if state.global_step == self._edges[0]:
            self.before.append(now - self._last)
        else:
            self.blocks.append(1e3 * (now - self._last) / self.block)
        self._last = now


class _Bench(Workbench):
    """A model of random weights and rows of random tokens."""

    quiet = True
    takes_signals = False

    def __init__(self, base: torch.nn.Module, shape: Shape, params: dict[str, Any], clock: _Clock) -> None:
        self._base, self._shape, self._params, self._clock = base, shape, params, clock

    def tokenizer(self, recipe: Recipe) -> PreTrainedTokenizerBase:
        """One that knows a word for each of a few tokens."""
        words = WordLevel({"<pad>": 0, "<eos>": 1, "<unk>": 2}, unk_token="<unk>")
        return PreTrainedTokenizerFast(
            tokenizer_object=Tokenizer(words), pad_token="<pad>", eos_token="<eos>", unk_token="<unk>"
        )

    def base_model(self, recipe: Recipe, dtype: torch.dtype, device: torch.device) -> PreTrainedModel:
        """The model that all candidates share, in modules of its own."""
        return cast(PreTrainedModel, twin(self._base))

    def data(self, recipe: Recipe, tokenizer: PreTrainedTokenizerBase) -> RunData:
        """Rows of lengths between two bounds, with labels on their last quarter."""
        shortest, longest = self._params["shortest"], self._params["longest"]
        count = recipe.max_steps * recipe.per_device_train_batch_size
        rows = random_rows(self._shape, count, shortest, longest)
        names = [f"row {number}" for number in range(count)]
        return RunData(Encoded(rows, longest=longest, names=names), None, {}, "plain", "")

    def callbacks(self, trainer: Any) -> list[TrainerCallback | Any]:
        """The clock."""
        return [self._clock]
