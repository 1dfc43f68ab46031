"""What a run costs: parameters, speed, peak memory."""

from __future__ import annotations

import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn


@dataclass(frozen=True)
class ParameterCount:
    """Parameters of a model.

    Attributes:
        trained: Those that an optimizer updates, and those of a loaded adapter.
        total: All, packed quantized weights counted as what they stand for.
    """

    trained: int
    total: int


@dataclass
class Cost:
    """Cost of a stretch of work; complete once `measure` has ended.

    Attributes:
        samples: Samples done; the work sets it.
        tokens: Tokens done; the work sets it.
        wall_time: Seconds.
        peak_memory: Bytes. On CUDA the most that tensors took during the work; on a CPU the most that the
            process ever held (resident set); `None` where the system does not say.
    """

    samples: int = 0
    tokens: int = 0
    wall_time: float = 0.0
    peak_memory: int | None = None

    def summary(self) -> dict[str, float | int | None]:
        """Wall time, samples and tokens per second, peak memory in bytes."""
        speed = 1 / self.wall_time if self.wall_time > 0 else 0.0
        return {
            "wall_time": round(self.wall_time, 3),
            "samples_per_second": round(self.samples * speed, 3),
            "tokens_per_second": round(self.tokens * speed, 3),
            "peak_memory": self.peak_memory,
        }


def count_parameters(model: nn.Module) -> ParameterCount:
    """Parameters trained and in total.

    Args:
        model: Any model; of one that PEFT wraps, an adapter loaded for inference counts as trained.
    """
    prefix = getattr(getattr(model, "base_model", None), "prefix", None)
    marks = (prefix, "modules_to_save.") if isinstance(prefix, str) and hasattr(model, "peft_config") else ()
    trained = total = 0
    for name, parameter in model.named_parameters():
        size = _size(parameter)
        total += size
        trained += size if parameter.requires_grad or any(mark in name for mark in marks if mark) else 0
    return ParameterCount(trained, total)


@contextmanager
def measure(device: torch.device) -> Iterator[Cost]:
    """Measure wall time and peak memory of the work inside.

    Args:
        device: Device that the work runs on.
    """
    cuda = device.type == "cuda"
    if cuda:
        torch.cuda.synchronize(device)
        torch.cuda.reset_peak_memory_stats(device)
    cost = Cost()
    start = time.perf_counter()
    try:
        yield cost
    finally:
        if cuda:
            torch.cuda.synchronize(device)
        cost.wall_time = time.perf_counter() - start
        cost.peak_memory = torch.cuda.max_memory_allocated(device) if cuda else peak_resident()


def peak_resident() -> int | None:
    """Most bytes that this process has held in memory so far; `None` where the system does not say."""
    try:
        import resource
    except ImportError:
        return None
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return peak if sys.platform == "darwin" else peak * 1024


def device_name(device: torch.device) -> str:
    """`"cpu"`, or the accelerator's own name."""
    return torch.cuda.get_device_name(device) if device.type == "cuda" else device.type


def _size(parameter: Any) -> int:
    if type(parameter).__name__ == "Params4bit":
        return parameter.numel() * 2 * parameter.element_size()
    return parameter.numel()
