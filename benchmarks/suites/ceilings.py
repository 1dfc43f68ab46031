"""What this machine reaches: a large matrix product, and a copy."""

from __future__ import annotations

import torch

from benchmarks.context import Context
from graphlora.benchmark.timing import Stopwatch, interleave


def measure(context: Context) -> None:
    """Records FLOP/s of a square product and bytes per second of a copy, read and written bytes counted."""
    size = context.case.params["size"]
    context.add("gemm", "rate", gemm_rate(context.device, context.dtype, size), "FLOP/s", size=size)
    context.add("copy", "rate", _copy_rate(context.device, size), "bytes/s")


def gemm_rate(device: torch.device, dtype: torch.dtype, size: int) -> float:
    """FLOP/s of a product of two square matrices of random numbers."""
    a, b = (torch.randn(size, size, device=device).to(dtype) for _ in range(2))

    def call(watch: Stopwatch) -> None:
        torch.mm(a, b)
        watch.lap("gemm")

    timing = interleave({"gemm": call}, device, warmup=3, iterations=20).timings["gemm"]["gemm"]
    return 2.0 * size**3 / (timing.median / 1e3)


def _copy_rate(device: torch.device, size: int) -> float:
    source = torch.randn(8 * size, size, device=device)
    target = torch.empty_like(source)

    def call(watch: Stopwatch) -> None:
        target.copy_(source)
        watch.lap("copy")

    timing = interleave({"copy": call}, device, warmup=3, iterations=20).timings["copy"]["copy"]
    return 2.0 * source.numel() * source.element_size() / (timing.median / 1e3)
