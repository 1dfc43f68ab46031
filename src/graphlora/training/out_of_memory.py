"""A run that is out of memory ends in one line: the settings to change, and how much each is expected to save."""

from __future__ import annotations

import errno
import gc
import traceback
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch

from graphlora.benchmark.savings import MemoryModel, Run
from graphlora.errors import GraphLoraError
from graphlora.training.adapting import adapter_config
from graphlora.training.data import IGNORED
from graphlora.training.recipe import RECORDED, Recipe

MESSAGES = (
    "defaultcpuallocator",
    "not enough memory",
    "out of memory",
    "cannot allocate memory",
    "alloc_failed",
)
# A setting that saves less than this share of the peak is no remedy.
SMALLEST_SHARE = 0.01
SHORTEST = 32


@dataclass
class Facts:
    """What is known of a run when it runs out of memory.

    Attributes:
        recipe: The run.
        config: Config of the base model; `None` until it is loaded.
        device: Where it trains.
        dtype: Dtype of the frozen weights.
        rows: Token rows; `None` until they are loaded, or where they are streamed.
    """

    recipe: Recipe
    config: Any = None
    device: torch.device | None = None
    dtype: torch.dtype | None = None
    rows: Any = None


@contextmanager
def explained_memory(recipe: Recipe) -> Iterator[Facts]:
    """Turns a device or a machine that is out of memory into one line with the options that save some.

    The caller fills in the facts as they become known.

    Raises:
        GraphLoraError: In place of `torch.OutOfMemoryError`, `MemoryError` and their kin.
    """
    facts = Facts(recipe)
    try:
        yield facts
    except (RuntimeError, MemoryError, OSError, GraphLoraError) as error:
        if not is_out_of_memory(error):
            raise
        # What the run holds must go before anything is measured.
        traceback.clear_frames(error.__traceback__)
        place = "the GPU" if "cuda" in str(error).lower() or _on_gpu(error) else "the machine"
        raise GraphLoraError(_advice(facts, place)) from error


def is_out_of_memory(error: BaseException | None) -> bool:
    """Whether an error, or what caused it, says that memory could not be had."""
    seen: set[int] = set()
    while error is not None and id(error) not in seen:  # an error raised from itself is its own cause
        seen.add(id(error))
        if isinstance(error, (torch.OutOfMemoryError, MemoryError)):
            return True
        if isinstance(error, OSError) and error.errno == errno.ENOMEM:
            return True
        if isinstance(error, RuntimeError) and any(text in str(error).lower() for text in MESSAGES):
            return True
        error = error.__cause__
    return False


def _on_gpu(error: BaseException) -> bool:
    return isinstance(error, torch.OutOfMemoryError) and torch.cuda.is_available()


def _advice(facts: Facts, place: str) -> str:
    recipe = facts.recipe
    model = _memory_model(facts)
    if facts.config is None:
        return f"{place} is out of memory while it loads the model; {_join(_loading(recipe))}"
    run = _run(facts)
    options: list[tuple[str, int | None]] = []
    model = model if run.length else None
    peak = None if model is None else model.peak(run)
    for text, changes in _remedies(facts, run):
        saved = model.saving(run, **changes) if model is not None and changes else None
        if saved is None or peak is None or saved >= SMALLEST_SHARE * peak:
            options.append((text, saved))
    needs = "" if peak is None else f"; a step of this run takes about {_gb(peak)} by prediction"
    advice = (
        f"set {_join([_with_saving(*option) for option in options])}" if options else "take a smaller model"
    )
    return f"{place} is out of memory{needs}; {advice}"


def _remedies(facts: Facts, run: Run) -> list[tuple[str, dict[str, Any]]]:
    """Settings that would save memory, the cheapest first, and what they change in `Run`."""
    recipe = facts.recipe
    rows, parts = recipe.per_device_train_batch_size, recipe.gradient_accumulation_steps
    found: list[tuple[str, dict[str, Any]]] = []
    if rows > 1:
        text = (
            f"per_device_train_batch_size to {rows // 2} and gradient_accumulation_steps to "
            f"{parts * rows // (rows // 2)}"
        )
        found.append((text, {"rows": rows // 2}))
    records = recipe.step_mode in RECORDED
    if records:
        found.append(("step_mode to eager", {}))
    on_gpu = facts.device is not None and facts.device.type == "cuda"
    if on_gpu and recipe.loss_kernel != "liger" and not records:
        found.append(("loss_kernel to liger", {"fused_loss": True}))
    if recipe.method == "graphlora" and not recipe.recompute_gate_up and not recipe.gradient_checkpointing:
        found.append(("recompute_gate_up to true", {"recompute_gate_up": True}))
    if not recipe.gradient_checkpointing:
        found.append(("gradient_checkpointing to true", {"gradient_checkpointing": True}))
    if not recipe.load_in_4bit:
        found.append(("load_in_4bit to true", {"load_in_4bit": True}))
    if run.length == 0:
        found.append(("max_length to a smaller number", {}))
    elif run.length >= 2 * SHORTEST:
        half = {"length": run.length // 2, "positions": min(run.positions, run.length // 2)}
        found.append((f"max_length to {run.length // 2} (rows longer than that need truncation)", half))
    return found


def _loading(recipe: Recipe) -> list[str]:
    found = [] if recipe.load_in_4bit else ["load_in_4bit to true (a quarter of bfloat16)"]
    if recipe.dtype not in ("bfloat16", "float16"):
        found.append("dtype to bfloat16 (half of float32)")
    return [f"set {found[0]}", *found[1:], "a smaller model"] if found else ["take a smaller model"]


def _run(facts: Facts) -> Run:
    recipe = facts.recipe
    longest = max((len(row["input_ids"]) for row in facts.rows or []), default=0) or recipe.max_length or 0
    labels = max(
        (sum(label != IGNORED for label in row["labels"]) for row in facts.rows or []), default=longest
    )
    return Run(
        rows=recipe.per_device_train_batch_size,
        length=longest,
        positions=labels,
        gradient_checkpointing=recipe.gradient_checkpointing,
        recompute_gate_up=bool(recipe.recompute_gate_up),
        load_in_4bit=recipe.load_in_4bit,
        fused_loss=recipe.loss_kernel == "liger",
    )


def _memory_model(facts: Facts) -> MemoryModel | None:
    """The predictor; `None` where too little is known, or memory is too short even for one layer."""
    if facts.config is None or facts.device is None or facts.dtype is None:
        return None
    gc.collect()
    if facts.device.type == "cuda":
        torch.cuda.empty_cache()
    try:
        return MemoryModel(facts.config, adapter_config(facts.recipe), facts.device, facts.dtype)
    except (RuntimeError, MemoryError, GraphLoraError):
        return None


def _with_saving(text: str, saved: int | None) -> str:
    return text if saved is None else f"{text} (about {_gb(saved)} less)"


def _join(parts: list[str]) -> str:
    return ", or ".join(parts)


def _gb(num_bytes: int) -> str:
    return f"{num_bytes / 1e9:.1f} GB" if num_bytes >= 1e8 else f"{num_bytes / 1e9:.3f} GB"
