"""One line of data per measurement, and the folder that holds them. Imports no torch."""

from __future__ import annotations

import json
from collections.abc import Iterable, Sequence
from dataclasses import asdict, dataclass, field, fields
from pathlib import Path
from typing import Any

from graphlora.errors import GraphLoraError

OK, FAILED, SKIPPED = "ok", "failed", "skipped"


@dataclass(frozen=True)
class Measurement:
    """One number and where it comes from.

    Attributes:
        suite: the group of cases it belongs to, such as `"ffn"`.
        case: what was measured, such as `"llama3-8b r8 T8192 balanced"`.
        candidate: who, such as `"triton"`.
        phase: which part or which quantity, such as `"full"` or `"peak_memory"`.
        status: `"ok"`, `"failed"` (see `error`) or `"skipped"` (cannot be measured here).
        value: the median, or the quantity itself.
        unit: `"ms"`, `"bytes"`, ...
        low: 20% quantile of a time.
        high: 80% quantile of a time.
        iterations: timed iterations.
        extra: further facts about it.
        error: what went wrong.
        params: shape, rank, tokens, skew, dtype and the like.
        attempt: the same for all that was interleaved; ratios are taken within one attempt only.
        session: the same for all that one call of the runner measured.
        created: UTC time, ISO 8601.
        tiny: made with tiny sizes, to try the runner; not a result.
        provenance: commit, versions, device, command.
    """

    suite: str
    case: str
    candidate: str
    phase: str
    status: str = OK
    value: float | None = None
    unit: str = "ms"
    low: float | None = None
    high: float | None = None
    iterations: int | None = None
    extra: dict[str, Any] = field(default_factory=dict)
    error: str | None = None
    params: dict[str, Any] = field(default_factory=dict)
    attempt: str = ""
    session: str = ""
    created: str = ""
    tiny: bool = False
    provenance: dict[str, Any] = field(default_factory=dict)


_NAMES = {item.name for item in fields(Measurement)}


def append(path: Path, measurements: Iterable[Measurement]) -> None:
    """Adds lines to a file of measurements."""
    path.parent.mkdir(parents=True, exist_ok=True)
    text = "".join(json.dumps(asdict(m), ensure_ascii=False, default=str) + "\n" for m in measurements)
    with path.open("a", encoding="utf-8") as file:
        file.write(text)
        file.flush()


def read(folders: Sequence[Path]) -> list[Measurement]:
    """All measurements of the folders, in the order of their files' names; a cut last line is left out.

    Raises:
        GraphLoraError: a line that is not a measurement.
    """
    found: list[Measurement] = []
    for folder in folders:
        for path in sorted(folder.glob("*.jsonl")):
            lines = path.read_text(encoding="utf-8").splitlines(keepends=True)
            for number, line in enumerate(lines, start=1):
                if not line.endswith("\n"):
                    continue
                found.append(_parse(line, f"{path}:{number}"))
    return found


def _parse(line: str, where: str) -> Measurement:
    try:
        values = json.loads(line)
    except json.JSONDecodeError as error:
        raise GraphLoraError(f"{where}: broken JSON ({error.msg}); remove the line") from error
    if not isinstance(values, dict) or not set(values) <= _NAMES:
        raise GraphLoraError(f"{where}: not a measurement; remove the line")
    return Measurement(**values)


def latest_attempts(measurements: Iterable[Measurement]) -> dict[tuple[str, str], list[Measurement]]:
    """The measurements of the last useful attempt of every case, by suite and case.

    An attempt with a measured value is more useful than one without.
    """
    attempts: dict[tuple[str, str], dict[str, list[Measurement]]] = {}
    for m in measurements:
        attempts.setdefault((m.suite, m.case), {}).setdefault(m.attempt, []).append(m)
    chosen = {}
    for key, by_attempt in attempts.items():
        ordered = sorted(
            by_attempt.values(), key=lambda group: (any(m.status == OK for m in group), group[0].created)
        )
        chosen[key] = ordered[-1]
    return chosen
