"""Row 9: whether gradients repeat bit for bit, and how far half precision is from a float64 oracle."""

from __future__ import annotations

import torch
from torch import Tensor

from benchmarks.candidates.ffn import FfnBench, FfnCandidate
from benchmarks.context import Context
from benchmarks.gate import poison, relative_error
from benchmarks.shapes import SHAPES

CANDIDATES = ("triton", "peft_bfloat16", "torch", "eager")
REPEATS = 3
# Errors are compared per kind of tensor, since a plain LoRA has other tensors than a mixture.
KINDS = ("output", "input gradient", "adapter gradients")


def measure(context: Context) -> None:
    """Compares runs with each other, then with the same computation in float64.

    `error` is the norm of the difference over the norm of the float64 value; of the three kinds the table takes, for
    each candidate, the largest one relative to plain LoRA's (`error` of plain LoRA is 1 by that definition).
    """
    p = context.case.params
    bench = FfnBench(SHAPES[p["shape"]], p["r"], p["tokens"], "skewed", context.device, context.dtype)
    double = bench.in_double()
    oracle = double.candidate("eager")
    truth = oracle.gradients(double.x, double.dy)
    made = context.build(CANDIDATES, bench.candidate)
    errors: dict[str, list[float]] = {}
    for name, candidate in made.items():
        values, differing = _repeat(candidate, bench)
        context.add(name, "differing", float(differing), "tensors", repeats=REPEATS)
        exact = truth
        if name.startswith("peft"):
            # The same adapter in float64: what it computes is read back from the candidate's own weights.
            exact = _peft_truth(bench, double, candidate)
        errors[name] = _errors(values, exact)
    plain = errors.get("peft_bfloat16")
    for name, by_kind in errors.items():
        facts = dict(zip(KINDS, by_kind, strict=True))
        if plain is None:
            context.fail(name, "plain LoRA could not be run, so there is nothing to compare with", "error")
            continue
        worst = max(mine / max(its, 1e-30) for mine, its in zip(by_kind, plain, strict=True))
        context.add(name, "error", worst, "x", **facts)


def _repeat(candidate: FfnCandidate, bench: FfnBench) -> tuple[tuple[Tensor, ...], int]:
    first = candidate.gradients(bench.x, bench.dy)
    differing: set[int] = set()
    for _ in range(REPEATS - 1):
        poison(bench.device)
        again = candidate.gradients(bench.x, bench.dy)
        differing |= {i for i, (a, b) in enumerate(zip(first, again, strict=True)) if not torch.equal(a, b)}
    return first, len(differing)


def _peft_truth(bench: FfnBench, double: FfnBench, candidate: FfnCandidate) -> tuple[Tensor, ...]:
    """Plain LoRA's output and gradients in float64, from the same weights."""
    exact = double.candidate("peft_float32")
    with torch.no_grad():
        for target, source in zip(exact.inputs, candidate.inputs, strict=True):
            target.data = source.detach().double()
    return exact.gradients(double.x, double.dy)


def _errors(values: tuple[Tensor, ...], truth: tuple[Tensor, ...]) -> list[float]:
    adapters = [
        torch.cat(
            [t.detach().double().flatten() / scale for t, scale in zip(side[2:], _norms(truth), strict=True)]
        )
        for side in (values, truth)
    ]
    return [
        relative_error(values[0], truth[0]),
        relative_error(values[1], truth[1]),
        relative_error(*adapters),
    ]


def _norms(truth: tuple[Tensor, ...]) -> list[Tensor]:
    """So that each adapter tensor counts alike, whatever its size."""
    return [t.detach().double().norm().clamp_min(1e-30) for t in truth[2:]]
