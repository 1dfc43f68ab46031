"""What a reader under test is, and what happened to one input."""

from __future__ import annotations

import signal
import time
import traceback
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from random import Random
from typing import Any

from graphlora.errors import MAX_LENGTH, GraphLoraError

SLOW = 5.0
# name of the file inside the input's folder -> its bytes
Input = dict[str, bytes]


@dataclass(frozen=True)
class Reader:
    """A reader of files, in its two stages.

    Attributes:
        name: Name on the command line.
        title: What it reads, for the record.
        generate: Makes an input; all of it follows from the generator.
        parse: Reads the syntax of the input in a folder.
        validate: Checks what `parse` gave, as far as the program does before it builds or trains anything.
        modules: Files below `src/graphlora` whose branches are the validators'.
        excluded: Functions of those files that no input reaches: the hub, writing, the command line.
        use: Goes on with an accepted input as a user would (loads it); done for few inputs.
    """

    name: str
    title: str
    generate: Callable[[Random], Input]
    parse: Callable[[Path], Any]
    validate: Callable[[Any], Any]
    modules: tuple[str, ...]
    excluded: tuple[str, ...] = ()
    use: Callable[[Path], Any] | None = None


@dataclass(frozen=True)
class Outcome:
    """What became of an input.

    Attributes:
        kind: `"syntax"` or `"validators"` for what refused it, `"accepted"`, or `"bug"`.
        detail: The message, or the traceback of a bug.
        seconds: CPU time it took.
    """

    kind: str
    detail: str
    seconds: float


class TooSlow(Exception):
    """An input took more than `SLOW` seconds of CPU time."""


def check(reader: Reader, folder: Path, uses: bool = False) -> Outcome:
    """Give the input that lies in a folder to a reader."""
    started = time.process_time()
    stage = "syntax"
    try:
        with _time_limit():
            parsed = reader.parse(folder)
            stage = "validators"
            reader.validate(parsed)
            if uses and reader.use is not None:
                reader.use(folder)
            stage, detail = "accepted", ""
    except GraphLoraError as error:
        detail = str(error)
        if not detail or len(detail) > MAX_LENGTH or not detail.isprintable():
            stage, detail = "bug", f"message is empty, long or not one line: {detail!r}"
    except (Exception, RecursionError) as error:
        stage, detail = "bug", f"{type(error).__name__}: {error}\n{traceback.format_exc(limit=-6)}"
    return Outcome(stage, detail, time.process_time() - started)


def write_input(files: Input, folder: Path, before: Input | None = None) -> None:
    """Put an input's files into a folder, in place of those of the one before."""
    for name in before or {}:
        if name not in files:
            (folder / name).unlink()
    for name, content in files.items():
        path = folder / name
        if "/" in name:
            path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(content)


@contextmanager
def _time_limit() -> Iterator[None]:
    def stop(*_: Any) -> None:
        raise TooSlow(f"more than {SLOW} s of CPU time")

    before = signal.signal(signal.SIGPROF, stop)
    signal.setitimer(signal.ITIMER_PROF, SLOW)
    try:
        yield
    finally:
        signal.setitimer(signal.ITIMER_PROF, 0)
        signal.signal(signal.SIGPROF, before)
