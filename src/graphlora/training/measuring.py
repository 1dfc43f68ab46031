"""Memory that a run takes, and what to do where it is not enough."""

from __future__ import annotations

import sys
from collections.abc import Iterator
from contextlib import contextmanager

import torch

from graphlora.errors import GraphLoraError
from graphlora.training.recipe import Recipe


def start_measuring(device: torch.device) -> None:
    """Forget the peaks of earlier work on a GPU; a process's own peak cannot be forgotten."""
    if device.type == "cuda":
        torch.cuda.reset_peak_memory_stats()


def peak_memory(device: torch.device) -> int | None:
    """Largest memory used so far in bytes: the allocator's on CUDA, else the process's; `None` if unknown."""
    if device.type == "cuda":
        return int(torch.cuda.max_memory_allocated())
    if sys.platform == "win32":
        return None
    import resource

    used = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return int(used if sys.platform == "darwin" else used * 1024)


def peak_reserved(device: torch.device) -> int | None:
    """Largest memory in bytes that PyTorch has taken from a GPU, unused parts included; `None` elsewhere."""
    return int(torch.cuda.max_memory_reserved()) if device.type == "cuda" else None


def memory_text(used: int | None, reserved: int | None) -> str:
    """`"3.2 GiB allocated, 3.9 GiB reserved on the GPU"`, `"1.1 GiB (the whole process)"` or `"unknown"`."""
    if used is None:
        return "unknown"
    if reserved is None:
        return f"{used / 2**30:.1f} GiB (the whole process)"
    return f"{used / 2**30:.1f} GiB allocated, {reserved / 2**30:.1f} GiB reserved on the GPU"


@contextmanager
def explained_memory(recipe: Recipe) -> Iterator[None]:
    """Turns an accelerator that is out of memory into one line with the options that save some.

    Raises:
        GraphLoraError: In place of `torch.OutOfMemoryError`.
    """
    try:
        yield
    except torch.OutOfMemoryError as error:
        raise GraphLoraError(f"the GPU is out of memory; {', '.join(_savings(recipe))}") from error


def _savings(recipe: Recipe) -> list[str]:
    """Options that would save memory, the cheapest first."""
    rows, parts = recipe.per_device_train_batch_size, recipe.gradient_accumulation_steps
    found = []
    if rows > 1:
        found.append(
            f"set per_device_train_batch_size to {rows // 2} and gradient_accumulation_steps to "
            f"{parts * rows // (rows // 2)} (the same step)"
        )
    if recipe.step_mode == "graph":
        found.append("step_mode to eager")
    if not recipe.gradient_checkpointing:
        found.append("gradient_checkpointing to true")
    if recipe.method == "graphlora" and not recipe.recompute_gate_up and not recipe.gradient_checkpointing:
        found.append("recompute_gate_up to true")
    if not recipe.load_in_4bit:
        found.append("load_in_4bit to true")
    found.append(
        f"or max_length below {recipe.max_length}" if recipe.max_length else "or a smaller max_length"
    )
    return found
