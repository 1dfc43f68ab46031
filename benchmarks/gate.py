"""The correctness gate: before a backend is timed, its outputs and all gradients must be those of the expert loop."""

from __future__ import annotations

import torch
from torch import Tensor

from benchmarks.candidates.ffn import FfnBench
from benchmarks.shapes import Shape
from graphlora.benchmark.timing import describe_error

# Relative norms of the difference from the float32 expert loop. Half precision rounds every [tokens, f] product, so
# there the expert loop's own error decides.
FLOAT32_TOLERANCE = 2e-5
# The whole layer against the loop in the same precision: both round.
ROUTER_TOLERANCE = 1e-4
HALF_PRECISION_FACTOR = 1.5
HALF_PRECISION_FLOOR = 2e-3

# Odd sizes, so that every mask of a kernel is at work.
_SHAPE = Shape("gate", "llama", 200, 328, 1, 4, 2, 64)
_TOKENS = 189


def poison(device: torch.device) -> None:
    """Leaves NaN in the memory that the next allocations get, so that whatever is not written shows."""
    blocks = [
        torch.full((size,), float("nan"), device=device)
        for size in (256, 2048, 16384, 131072, 1048576, 4194304)
        for _ in range(4)
    ]
    del blocks


def check(
    backend: str, device: torch.device, failures: tuple[type[Exception], ...], dtype: torch.dtype
) -> list[str]:
    """What is wrong with a backend; empty where it may be timed.

    Args:
        backend: name of the path, such as `"triton"`.
        device: where it runs.
        failures: errors that count as a finding.
        dtype: float32, or a half precision.
    """
    problems = []
    for skew in ("balanced", "skewed"):
        for r in (8, 16):
            bench = FfnBench(_SHAPE, r, _TOKENS, skew, device, dtype)
            where = f"{backend} {str(dtype).removeprefix('torch.')} r={r} {skew}"
            try:
                problems += [f"{where}: {problem}" for problem in _compare(backend, bench)]
                if dtype == torch.float32:
                    problems += [
                        f"{where}, whole layer: {problem}" for problem in _compare_layers(backend, bench)
                    ]
            except failures as error:
                problems.append(f"{where}: {describe_error(error)}")
    return problems


def _compare(backend: str, bench: FfnBench) -> list[str]:
    oracle_bench = bench.in_double()
    oracle = oracle_bench.candidate("eager")
    truth = oracle.gradients(oracle_bench.x, oracle_bench.dy)
    candidate = bench.candidate(backend)
    loop = bench.candidate("eager").gradients(bench.x, bench.dy)
    names = ("output", "x", *candidate.names)
    poison(bench.device)
    first = candidate.gradients(bench.x, bench.dy)
    poison(bench.device)
    second = candidate.gradients(bench.x, bench.dy)
    problems = []
    for name, value, again, want, reference in zip(names, first, second, truth, loop, strict=True):
        error = relative_error(value, want)
        limit = FLOAT32_TOLERANCE
        if bench.dtype != torch.float32:
            limit = max(HALF_PRECISION_FLOOR, HALF_PRECISION_FACTOR * relative_error(reference, want))
        if not error <= limit:
            problems.append(f"{name} is {error:.2g} from the oracle, more than {limit:.2g}")
        if not torch.equal(value, again):
            problems.append(f"{name} differs between two runs")
    return problems


def _compare_layers(backend: str, bench: FfnBench) -> list[str]:
    """The block with its own router; in float32 alone, because half precision sends tokens near a tie elsewhere."""
    loop, candidate = bench.candidate("eager_layer"), bench.candidate(f"{backend}_layer")
    truth = loop.gradients(bench.x, bench.dy)
    poison(bench.device)
    values = candidate.gradients(bench.x, bench.dy)
    problems = []
    for name, value, want in zip(("output", "x", *candidate.names), values, truth, strict=True):
        error = relative_error(value, want)
        if not error <= ROUTER_TOLERANCE:
            problems.append(f"{name} is {error:.2g} from the loop, more than {ROUTER_TOLERANCE:.2g}")
    return problems


def relative_error(value: Tensor, truth: Tensor) -> float:
    """Norm of the difference over the norm of the truth; NaN where the value holds one."""
    value, truth = value.detach().double(), truth.detach().double()
    return float((value - truth).norm() / truth.norm().clamp_min(1e-30))
