"""Peak memory of this process."""

from __future__ import annotations

import sys

import torch


def peak_memory(device: torch.device) -> int | None:
    """Largest memory used so far in bytes: the allocator's on CUDA, else the process's; `None` if unknown."""
    if device.type == "cuda":
        return int(torch.cuda.max_memory_allocated())
    if sys.platform == "win32":
        return None
    import resource

    used = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return int(used if sys.platform == "darwin" else used * 1024)
