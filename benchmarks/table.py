"""The target table in Markdown: measured beside must and goal. Imports no torch."""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import dataclass

from benchmarks.measurement import FAILED, OK, Measurement, latest_attempts
from benchmarks.registry import SUITES
from benchmarks.targets import TARGETS, Target

_MISSING = "not measured"


@dataclass(frozen=True)
class Verdict:
    """What the data say about one line of the target table.

    Attributes:
        target: the line.
        by_case: measured value of every case, in the order of their names.
        failed: candidates that failed in matching cases, with the error.
        expected: number of cases that the registry has for it.
    """

    target: Target
    by_case: dict[str, float]
    failed: tuple[str, ...]
    expected: int

    @property
    def worst(self) -> float | None:
        """The largest value, which is the one that counts."""
        return max(self.by_case.values(), default=None)

    @property
    def text(self) -> str:
        """`goal met`, `must met`, `missed`, `failed` or `not measured`; says where cases are missing."""
        if self.worst is None:
            return "failed" if self.failed else _MISSING
        if self.worst > self.target.must:
            return "**missed**"
        if self.failed:
            return "**failed** in part"
        met = "goal met" if self.worst <= self.target.goal else "must met"
        return met if len(self.by_case) >= self.expected else f"{met} so far"


def verdicts(measurements: Sequence[Measurement]) -> list[Verdict]:
    """One verdict per line of the target table; ratios are taken within one attempt only."""
    attempts = latest_attempts(measurements)
    return [_verdict(target, attempts) for target in TARGETS]


def _verdict(target: Target, attempts: dict[tuple[str, str], list[Measurement]]) -> Verdict:
    by_case, failed = {}, []
    for (suite, case), group in sorted(attempts.items()):
        if suite != target.suite or not _matches(target, group[0]):
            continue
        found = {m.candidate: m.value for m in group if m.status == OK and m.phase == target.phase}
        mine = found.get(target.candidate)
        base = _base(target, found)
        if mine is not None and base:
            by_case[case] = mine / base
        failed += [
            f"{m.candidate}: {m.error}"
            for m in group
            if m.status == FAILED and m.candidate in {target.candidate, *_names(target.against), "all"}
        ]
    expected = sum(re.fullmatch(target.cases, case.name) is not None for case in SUITES[target.suite].cases)
    return Verdict(target, by_case, tuple(failed), expected)


def _names(against: str | tuple[str, ...] | None) -> tuple[str, ...]:
    return () if against is None else (against,) if isinstance(against, str) else against


def _base(target: Target, found: dict[str, float | None]) -> float | None:
    """What a line divides by: the fastest of those that it names, once all are there."""
    values = [found.get(name) for name in _names(target.against)]
    known = [value for value in values if value]
    if len(known) < len(values):
        return None
    return min(known, default=1.0)


def _matches(target: Target, measurement: Measurement) -> bool:
    return measurement.tiny or re.fullmatch(target.cases, measurement.case) is not None


def number(value: float | None, unit: str) -> str:
    """A value as the table shows it."""
    if value is None:
        return "-"
    if unit == "x":
        return f"{value:.3f}"
    return f"{value:.3f} {unit}" if unit == "ms" else f"{value:.0f}"


def target_table(measurements: Sequence[Measurement]) -> str:
    """The target table; the measured value is the worst of the cases, whose range stands beside it."""
    lines = [
        "| # | what | measured (worst) | range; cases | must | goal | verdict |",
        "|---|---|---|---|---|---|---|",
    ]
    for verdict in verdicts(measurements):
        t = verdict.target
        values = sorted(verdict.by_case.values())
        spread = (
            f"{number(values[0], t.unit)} to {number(values[-1], t.unit)}; {len(values)} of {verdict.expected}"
            if values
            else f"0 of {verdict.expected}"
        )
        cells = (
            t.row, t.what, number(verdict.worst, t.unit), spread,
            number(t.must, t.unit), number(t.goal, t.unit), verdict.text,
        )  # fmt: skip
        lines.append(f"| {' | '.join(cells)} |")
    return "\n".join(lines)


def step_table(measurements: Sequence[Measurement]) -> str:
    """Every whole-step case: milliseconds, peak GiB, tokens per second, MFU, and the time relative to frozen."""
    parts = []
    fastest = _fastest_product(measurements)
    for (suite, case), group in sorted(latest_attempts(measurements).items()):
        if suite != "step":
            continue
        flops = {m.candidate: m.extra["flops"] for m in group if m.phase == "mfu" and m.status == OK}
        lines = [
            f"**{case}**", "",
            "| candidate | ms per step | / frozen | peak GiB | tokens/s | MFU | trained |",
            "|---|---|---|---|---|---|---|",
        ]  # fmt: skip
        values = {(m.candidate, m.phase): m.value for m in group if m.status == OK and m.value is not None}
        frozen = values.get(("frozen", "full"))
        for m in group:
            if m.phase != "full":
                continue
            if m.value is None:
                lines.append(f"| {m.candidate} | {m.status}: {(m.error or '')[:80]} | | | | | |")
                continue
            peak = values.get((m.candidate, "peak_memory"))
            cells = (
                m.candidate, f"{m.value:.1f}", f"{m.value / frozen:.2f}" if frozen else "-",
                f"{peak / 2**30:.1f}" if peak else "-",
                f"{values.get((m.candidate, 'tokens_per_second'), 0):,.0f}",
                f"{flops.get(m.candidate, 0) / (m.value / 1e3) / fastest:.1%}" if fastest else "-",
                f"{values.get((m.candidate, 'trained'), 0) / 1e6:.1f} M",
            )  # fmt: skip
            lines.append(f"| {' | '.join(cells)} |")
        parts.append("\n".join(lines))
    return "\n\n".join(parts) or "No whole step has been measured."


def _fastest_product(measurements: Sequence[Measurement]) -> float:
    """FLOP/s of the fastest product of any run of whole steps.

    Each case measures it behind its steps, where the GPU may have slowed down: no MFU should gain by that.
    """
    found = (m.extra.get("peak_flops", 0.0) for m in measurements if m.suite == "step" and m.phase == "mfu")
    return max(found, default=0.0)


def matrix_table(measurements: Sequence[Measurement]) -> str:
    """The FFN matrix: forward, backward and both in milliseconds, and the ratios that count."""
    lines = [
        "| case | frozen | triton (forward + backward) | / frozen | / PEFT float32 | / PEFT bf16 |",
        "|---|---|---|---|---|---|",
    ]
    for (suite, case), group in sorted(
        latest_attempts(measurements).items(), key=lambda item: _natural(item[0][1])
    ):
        if suite != "ffn":
            continue
        values = {(m.candidate, m.phase): m.value for m in group if m.status == OK}
        # Of few tokens, Python's launches take longer than the kernels: there a replayed graph counts.
        phase = "graph" if ("triton", "graph") in values else "full"
        mine, frozen = values.get(("triton", phase)), values.get(("frozen", phase))
        if not mine or not frozen:
            lines.append(f"| {case} | failed | | | | |")
            continue
        ratios = [values.get((name, phase)) for name in ("frozen", "peft_float32", "peft_bfloat16")]
        halves = f"{values[('triton', 'forward')]:.2f} + {values[('triton', 'backward')]:.2f}"
        halves = halves if phase == "full" else "replayed"
        cells = (
            case,
            f"{frozen:.2f}",
            f"{mine:.2f} ({halves})",
            *(f"{mine / r:.3f}" if r else "-" for r in ratios),
        )
        lines.append(f"| {' | '.join(cells)} |")
    return "\n".join(lines)


def candidates_table(measurements: Sequence[Measurement]) -> str:
    """Every candidate of the FFN cases that have all of them, relative to the frozen block."""
    lines = [
        "| case | candidate | forward ms | backward ms | both ms | / frozen |",
        "|---|---|---|---|---|---|",
    ]
    for (suite, case), group in sorted(latest_attempts(measurements).items()):
        names = list(dict.fromkeys(m.candidate for m in group))
        if suite != "ffn" or "eager" not in names:
            continue
        values = {(m.candidate, m.phase): m.value for m in group if m.status == OK}
        frozen = values.get(("frozen", "full"))
        for name in names:
            full = values.get((name, "full"))
            if full is None or not frozen:
                lines.append(f"| {case} | {name} | failed | | | |")
                continue
            cells = (
                case, name, f"{values[(name, 'forward')]:.2f}", f"{values[(name, 'backward')]:.2f}",
                f"{full:.2f}", f"{full / frozen:.2f}",
            )  # fmt: skip
            lines.append(f"| {' | '.join(cells)} |")
    return "\n".join(lines)


def others_table(measurements: Sequence[Measurement]) -> str:
    """What the other suites measured, one line per candidate and phase."""
    lines = ["| suite | case | candidate | what | value |", "|---|---|---|---|---|"]
    for (suite, case), group in sorted(
        latest_attempts(measurements).items(), key=lambda item: _natural(" ".join(item[0]))
    ):
        if suite in {"ffn", "step"}:
            continue
        for m in group:
            if m.status == OK and m.value is not None:
                lines.append(
                    f"| {suite} | {case} | {m.candidate} | {m.phase} | {_quantity(m.value, m.unit)} |"
                )
            else:
                lines.append(
                    f"| {suite} | {case} | {m.candidate} | {m.phase} | {m.status}: {(m.error or '')[:80]} |"
                )
    return "\n".join(lines)


def _quantity(value: float, unit: str) -> str:
    if unit == "bytes":
        return f"{value / 2**30:.2f} GiB" if value >= 2**30 else f"{value / 2**20:.1f} MiB"
    if unit == "FLOP/s":
        return f"{value / 1e12:.0f} TFLOP/s"
    if unit == "bytes/s":
        return f"{value / 1e12:.2f} TB/s"
    return f"{value:.4g} {unit}"


def _natural(text: str) -> list[tuple[int, str]]:
    return [(int(part), "") if part.isdigit() else (-1, part) for part in re.split(r"(\d+)", text)]
