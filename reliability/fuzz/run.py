"""Runs many inputs through a reader, counts what became of them, and keeps those that found bugs."""

from __future__ import annotations

import hashlib
import json
import resource
import shutil
import sys
import tempfile
import time
import warnings
from collections import Counter
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from random import Random
from typing import Any

from reliability.fuzz.adapter import CONFIG, WEIGHTS
from reliability.fuzz.authors import AUTHORS
from reliability.fuzz.data_files import DATA
from reliability.fuzz.reader import Input, Outcome, Reader, check, write_input
from reliability.fuzz.yaml_files import RECIPE, STUDY
from reliability.record import ROOT

READERS = {reader.name: reader for reader in (CONFIG, WEIGHTS, STUDY, RECIPE, DATA, AUTHORS)}
CORPUS = ROOT / "tests" / "fuzz" / "corpus"
# Files of inputs are written and read a hundred thousand times; a file system in memory keeps the disk out of it.
IN_MEMORY = Path("/dev/shm")
USE_EVERY = 500
MEMORY = 2 * 2**30


@dataclass
class Counts:
    """What became of the inputs of one run.

    Attributes:
        outcomes: Inputs by kind of `Outcome`.
        bugs: First message of each different bug, with the number of its inputs.
        slowest: Seconds of CPU time of the slowest input.
        seconds: Seconds of all of them.
        memory_growth: Bytes that the process's peak memory grew by.
    """

    outcomes: Counter[str] = field(default_factory=Counter)
    bugs: Counter[str] = field(default_factory=Counter)
    slowest: float = 0.0
    seconds: float = 0.0
    memory_growth: int = 0

    @property
    def reached(self) -> float:
        """Share of the inputs that passed the syntax and reached the validators."""
        return 1 - self.outcomes["syntax"] / max(1, self.outcomes.total())


def fuzz(reader: Reader, count: int, seed: int, corpus: Path | None = None, progress: bool = False) -> Counts:
    """Give `count` generated inputs to a reader.

    Args:
        reader: The reader.
        count: Number of inputs.
        seed: Input number i depends on the seed and i alone.
        corpus: Folder that takes the inputs of bugs; left out: none are kept.
        progress: Write a line every few seconds.
    """
    counts = Counts()
    started = shown = time.perf_counter()
    memory = _peak_memory()
    with (
        tempfile.TemporaryDirectory(dir=IN_MEMORY if IN_MEMORY.is_dir() else None) as place,
        warnings.catch_warnings(),
        ExitStack() as stack,
    ):
        warnings.simplefilter("ignore")
        stack.enter_context(_bounded_memory())
        folder = Path(place) / "input"
        folder.mkdir()
        before: Input = {}
        for number in range(count):
            files = reader.generate(Random(f"{reader.name}-{seed}-{number}"))
            write_input(files, folder, before)
            before = files
            outcome = check(reader, folder, uses=number % USE_EVERY == 0)
            _count(counts, outcome)
            if outcome.kind == "bug" and corpus is not None:
                _keep(files, outcome, corpus / reader.name)
            if progress and time.perf_counter() - shown > 10:
                shown = time.perf_counter()
                sys.stderr.write(f"{reader.name}: {number + 1:,} of {count:,}, {dict(counts.outcomes)}\n")
    counts.seconds, counts.memory_growth = time.perf_counter() - started, _peak_memory() - memory
    return counts


def replay(reader: Reader, entry: Path, folder: Path) -> Outcome:
    """Give one input of the corpus to a reader.

    Args:
        reader: The reader.
        entry: The folder of its files in the corpus.
        folder: An empty folder to copy them to.
    """
    files = {str(path.relative_to(entry)): path.read_bytes() for path in entry.rglob("*") if path.is_file()}
    write_input(files, folder)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        return check(reader, folder, uses=True)


def branches(reader: Reader, count: int, seed: int) -> dict[str, Any]:
    """Branch coverage of a reader's validators over a sample of its inputs; needs the package `coverage`.

    Returns:
        `covered` and `all` branches, and by file the functions with branches that were not taken.
    """
    import coverage

    source = ROOT / "src" / "graphlora"
    files = [str(source / module) for module in reader.modules]
    with tempfile.TemporaryDirectory() as place:
        watch = coverage.Coverage(branch=True, include=files, data_file=str(Path(place) / "data"))
        watch.start()
        fuzz(reader, count, seed)
        watch.stop()
        report = Path(place) / "report.json"
        watch.json_report(outfile=str(report))
        measured = json.loads(report.read_text())["files"]
    found: dict[str, Any] = {"covered": 0, "all": 0, "sample": count, "open": {}}
    for path, values in sorted(measured.items()):
        for name, function in values["functions"].items():
            summary = function["summary"]
            if name and name not in reader.excluded and name.split(".")[-1] not in reader.excluded:
                found["covered"] += summary["covered_branches"]
                found["all"] += summary["num_branches"]
                if summary["missing_branches"]:
                    found["open"][f"{Path(path).name}:{name}"] = function["missing_branches"]
    return found


def _count(counts: Counts, outcome: Outcome) -> None:
    counts.outcomes[outcome.kind] += 1
    counts.slowest = max(counts.slowest, outcome.seconds)
    if outcome.kind == "bug":
        counts.bugs[_kind_of_bug(outcome)] += 1


def _kind_of_bug(outcome: Outcome) -> str:
    lines = outcome.detail.splitlines()
    places = [
        line.strip() for line in lines if line.strip().startswith("File ") and "reliability/fuzz" not in line
    ]
    return f"{lines[0][:150]} @ {places[-1] if places else ''}"


def _keep(files: Input, outcome: Outcome, corpus: Path) -> None:
    """Keep one input for each kind of bug, the smallest."""
    kind = _kind_of_bug(outcome).split(":")[0] + _kind_of_bug(outcome).rpartition("@")[2]
    entry = corpus / f"bug-{hashlib.sha256(kind.encode()).hexdigest()[:10]}"
    size = sum(path.stat().st_size for path in entry.rglob("*") if path.is_file()) if entry.is_dir() else None
    if size is None or sum(map(len, files.values())) < size:
        shutil.rmtree(entry, ignore_errors=True)
        entry.mkdir(parents=True)
        write_input(files, entry)


@contextmanager
def _bounded_memory() -> Iterator[None]:
    """An input that asks for more than `MEMORY` bytes gets a MemoryError, which counts as a bug."""
    in_use = int(Path("/proc/self/statm").read_text().split()[0]) * resource.getpagesize()
    before = resource.getrlimit(resource.RLIMIT_AS)
    resource.setrlimit(resource.RLIMIT_AS, (in_use + MEMORY, before[1]))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_AS, before)


def _peak_memory() -> int:
    return 1024 * resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
