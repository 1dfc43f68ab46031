"""What a GPU runs, seen by PyTorch's profiler."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import torch
from torch.profiler import ProfilerActivity, profile


@dataclass
class Kernels:
    """Kernels of a run, by the first 100 letters of their names.

    Attributes:
        counts: launches.
        micros: microseconds on the device, all launches together.
        copies: copies and fills, which are not among the kernels.
        copy_micros: their microseconds.
    """

    counts: Counter[str] = field(default_factory=Counter)
    micros: Counter[str] = field(default_factory=Counter)
    copies: int = 0
    copy_micros: float = 0.0

    def lines(self) -> list[str]:
        """One line per kernel, those that take longest first."""
        return [
            f"{self.counts[name]} x {name}: {micros:.0f} us" for name, micros in self.micros.most_common()
        ]


def kernels_of(run: Callable[[], object]) -> Kernels:
    """The kernels that `run` launches on the current CUDA device."""
    with profile(activities=[ProfilerActivity.CUDA, ProfilerActivity.CPU]) as profiler:
        run()
        torch.cuda.synchronize()
    found = Kernels()
    for event in profiler.events() or []:
        if event.device_type != torch.autograd.DeviceType.CUDA or getattr(event, "is_user_annotation", False):
            continue
        if event.name.startswith(("Memcpy", "Memset")):
            found.copies += 1
            found.copy_micros += _device_micros(event)
            continue
        found.counts[event.name[:100]] += 1
        found.micros[event.name[:100]] += _device_micros(event)  # pyright: ignore[reportArgumentType]
    return found


def _device_micros(event: Any) -> float:
    return float(getattr(event, "device_time_total", None) or getattr(event, "cuda_time_total", 0.0))
