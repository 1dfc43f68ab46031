"""Timing of several candidates in one process, turn by turn, so that heat, clocks and neighbors hit all alike."""

from __future__ import annotations

import gc
import random
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field

import torch

FULL = "full"


@dataclass(frozen=True)
class Timing:
    """Time of one phase of one candidate, in milliseconds.

    Attributes:
        median: half of the iterations were faster.
        low: 20% were faster.
        high: 80% were faster.
        iterations: number of timed iterations.
    """

    median: float
    low: float
    high: float
    iterations: int


class Stopwatch:
    """Marks the ends of a call's phases: CUDA events on a GPU, the clock on a CPU.

    Args:
        device: where the work runs.
    """

    def __init__(self, device: torch.device) -> None:
        self.device = device
        self._names: list[str] = []
        self._marks: list[torch.cuda.Event | float] = [self._mark()]

    def _mark(self) -> torch.cuda.Event | float:
        if self.device.type != "cuda":
            return time.perf_counter()
        event = torch.cuda.Event(enable_timing=True)
        event.record()
        return event

    def lap(self, name: str) -> None:
        """Ends the phase `name`."""
        self._names.append(name)
        self._marks.append(self._mark())

    def milliseconds(self) -> dict[str, float]:
        """Time of each phase, and of all as `"full"`; call it after the device has finished."""
        spans = zip(self._names, self._marks, self._marks[1:], strict=False)
        times = {name: _between(start, end) for name, start, end in spans}
        times[FULL] = _between(self._marks[0], self._marks[-1])
        return times


def _between(start: torch.cuda.Event | float, end: torch.cuda.Event | float) -> float:
    if isinstance(start, torch.cuda.Event):
        assert isinstance(end, torch.cuda.Event)
        return start.elapsed_time(end)
    assert isinstance(end, float)
    return 1e3 * (end - start)


Call = Callable[[Stopwatch], None]


@dataclass
class Interleaved:
    """What `interleave` found.

    Attributes:
        timings: by candidate and phase.
        errors: candidates that failed, with their error; they were left out from then on.
    """

    timings: dict[str, dict[str, Timing]] = field(default_factory=dict)
    errors: dict[str, str] = field(default_factory=dict)


def interleave(
    calls: Mapping[str, Call],
    device: torch.device,
    *,
    warmup: int,
    iterations: int,
    seconds: float = float("inf"),
    failures: tuple[type[BaseException], ...] = (),
    in_a_row: int = 1,
    timed: int = 1,
) -> Interleaved:
    """Times the candidates turn by turn, in an order that is drawn anew for each turn.

    A GPU that waited is faster for a while, and the host's lead over it goes from one candidate to the next: whoever
    always followed one that launches slowly would gain, or lose.

    Args:
        calls: by name; each does one iteration and ends its phases with `Stopwatch.lap`.
        device: where the work runs.
        warmup: untimed rounds.
        iterations: timed rounds.
        seconds: stop early, with at least three timed rounds, when all this has taken so long.
        failures: errors that exclude a candidate instead of ending the measurement.
        in_a_row: calls of a candidate in each of its turns.
        timed: how many of these are timed, the last ones: they have others of their own kind before them.
    """
    result = Interleaved()
    alive = dict(calls)
    samples: dict[str, dict[str, list[float]]] = {name: {} for name in alive}
    end = time.monotonic() + seconds
    for turn in range(warmup + iterations):
        if turn >= warmup + 3 and time.monotonic() > end:
            break
        watches: dict[str, list[Stopwatch]] = {}
        for name, call in random.Random(turn).sample([*alive.items()], len(alive)):
            own = []
            try:
                for _ in range(in_a_row):
                    own.append(Stopwatch(device))
                    call(own[-1])
                    own[-1].lap("end")
                if turn == 0:
                    synchronize(device)
            except failures as error:
                result.errors[name] = describe_error(error)
                del alive[name]
                release(device)
                continue
            watches[name] = own[in_a_row - timed :]
        synchronize(device)
        if turn >= warmup:
            for name, own in watches.items():
                for phase, value in (each for watch in own for each in watch.milliseconds().items()):
                    samples[name].setdefault(phase, []).append(value)
    for name in alive:
        result.timings[name] = {
            phase: summarize(values) for phase, values in samples[name].items() if phase != "end"
        }
    return result


def summarize(values: list[float]) -> Timing:
    """Median and 20/80 quantiles."""
    quantiles = torch.tensor(values, dtype=torch.float64).quantile(
        torch.tensor([0.5, 0.2, 0.8], dtype=torch.float64)
    )
    median, low, high = quantiles.tolist()
    return Timing(median, low, high, len(values))


def synchronize(device: torch.device) -> None:
    """Waits for the device; a CPU is always done."""
    if device.type == "cuda":
        torch.cuda.synchronize(device)


def release(device: torch.device) -> None:
    """Gives memory that nothing holds any more back to the device."""
    gc.collect()
    if device.type == "cuda":
        torch.cuda.empty_cache()


def describe_error(error: BaseException) -> str:
    """Type and first lines of an error, for a record."""
    text = " ".join(str(error).split())
    return f"{type(error).__name__}: {text[:500]}"
