"""What a suite works with: where to measure, how long, and where the numbers go."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, field, replace
from typing import Any, TypeVar

import torch

from benchmarks.cases import Case
from benchmarks.failures import NotHere, failures
from benchmarks.gate import check
from benchmarks.measurement import FAILED, SKIPPED, Measurement
from graphlora.benchmark.timing import Call, Interleaved, describe_error, interleave, release

T = TypeVar("T")
_GATED = "triton"
# What a GPU's kernels are replaced by where a case is tried on a CPU.
_STAND_IN = "torch"


@dataclass
class Gate:
    """Runs the correctness gate once per process and dtype.

    Attributes:
        findings: problems by dtype.
    """

    findings: dict[torch.dtype, list[str]] = field(default_factory=dict)

    def problems(self, device: torch.device, dtype: torch.dtype) -> list[str]:
        """What keeps the kernels from being timed in this dtype; float32 must be right in any case."""
        backend = _GATED if device.type == "cuda" else _STAND_IN
        for each in dict.fromkeys((torch.float32, dtype)):
            if each not in self.findings:
                self.findings[each] = check(backend, device, failures(), each)
        return (
            [*self.findings[torch.float32], *self.findings[dtype]]
            if dtype != torch.float32
            else self.findings[dtype]
        )


@dataclass
class Context:
    """One case in the making.

    Attributes:
        case: what is measured.
        device: where.
        dtype: of the frozen weights.
        tiny: few iterations.
        gate: the correctness gate of this process.
        found: the measurements so far.
        seconds: the most that one interleaved measurement may take.
    """

    case: Case
    device: torch.device
    dtype: torch.dtype
    tiny: bool
    gate: Gate
    found: list[Measurement] = field(default_factory=list)
    seconds: float = 60.0

    def add(self, candidate: str, phase: str, value: float, unit: str = "ms", **more: Any) -> None:
        """Records one number; `more` are further fields of `Measurement`, or go to its `extra`."""
        known = {k: more.pop(k) for k in ("low", "high", "iterations") if k in more}
        self.found.append(
            Measurement(
                self.case.suite, self.case.name, candidate, phase, value=value, unit=unit, extra=more, **known
            )
        )

    def fail(self, candidate: str, error: str, phase: str = "full") -> None:
        """Records that a candidate failed."""
        self.found.append(
            Measurement(self.case.suite, self.case.name, candidate, phase, status=FAILED, error=error)
        )

    def skip(self, candidate: str, reason: str, phase: str = "full") -> None:
        """Records that something cannot be measured here."""
        self.found.append(
            Measurement(self.case.suite, self.case.name, candidate, phase, status=SKIPPED, error=reason)
        )

    def add_timings(self, result: Interleaved, extra: Mapping[str, Mapping[str, Any]] | None = None) -> None:
        """Records what `interleave` found."""
        for candidate, phases in result.timings.items():
            more = dict((extra or {}).get(candidate, {}))
            for phase, t in phases.items():
                self.add(candidate, phase, t.median, low=t.low, high=t.high, iterations=t.iterations, **more)
        for candidate, error in result.errors.items():
            self.fail(candidate, error)

    def interleave(
        self,
        calls: Mapping[str, Call],
        warmup: int = 10,
        iterations: int = 30,
        in_a_row: int = 1,
        timed: int = 1,
    ) -> Interleaved:
        """`graphlora.benchmark.timing.interleave`, with fewer iterations where the case is tiny."""
        if self.tiny:
            warmup, iterations = 1, 3
        return interleave(
            calls,
            self.device,
            warmup=warmup,
            iterations=iterations,
            seconds=self.seconds,
            failures=failures(),
            in_a_row=in_a_row,
            timed=timed,
        )

    def may_run(self, candidate: str) -> bool:
        """Whether the correctness gate lets the candidate be timed; records the refusal where it does not."""
        if _GATED not in candidate:
            return True
        problems = self.gate.problems(self.device, self.dtype)
        if problems:
            self.fail(candidate, f"correctness gate: {len(problems)} problems, first: {problems[0]}")
        return not problems

    def stand_in(self, candidate: str) -> str:
        """The candidate itself on a GPU; on a CPU the PyTorch path takes the place of the kernels."""
        return candidate if self.device.type == "cuda" else candidate.replace(_GATED, _STAND_IN)

    def build(self, names: Iterable[str], make: Callable[[str], T]) -> dict[str, T]:
        """Candidates that pass the gate and can be made; the others are recorded as failed, or as not here."""
        made = {}
        for name in names:
            if not self.may_run(name):
                continue
            try:
                made[name] = make(self.stand_in(name))
            except NotHere as error:
                self.skip(name, str(error))
            except failures() as error:
                self.fail(name, describe_error(error))
                release(self.device)
        return made

    def finished(self, **stamps: Any) -> list[Measurement]:
        """The measurements with the case's facts and the given stamps on each."""
        params = {**self.case.params, "dtype": str(self.dtype).removeprefix("torch.")}
        params.pop("candidates", None)
        return [replace(m, params=params, tiny=self.tiny, **stamps) for m in self.found]
