"""Memory that a run takes."""

from __future__ import annotations

import sys

import torch


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
