"""Command line: fuzz one reader, or all of them one after the other, and write the records."""

from __future__ import annotations

import argparse
import importlib.util
import sys
from collections.abc import Sequence

from reliability.fuzz.run import CORPUS, READERS, branches, fuzz
from reliability.record import write_record


def main(arguments: Sequence[str] | None = None) -> int:
    """Fuzzes and prints; 1 where an input found a bug."""
    parser = argparse.ArgumentParser(prog="python -m reliability.fuzz", description=__doc__)
    parser.add_argument("reader", choices=[*READERS, "all"], help="what to fuzz")
    parser.add_argument("--count", type=int, default=100_000, help="inputs (default: 100,000)")
    parser.add_argument("--seed", type=int, default=0, help="seed of the inputs (default: 0)")
    parser.add_argument("--sample", type=int, default=3000, help="inputs of the branch coverage; 0: none")
    parser.add_argument("--no_record", action="store_true", help="write no record, keep no input")
    options = parser.parse_args(arguments)
    names = list(READERS) if options.reader == "all" else [options.reader]
    return max([_fuzz(name, options) for name in names])


def _fuzz(name: str, options: argparse.Namespace) -> int:
    reader = READERS[name]
    counts = fuzz(reader, options.count, options.seed, None if options.no_record else CORPUS, progress=True)
    values: dict[str, object] = {
        "inputs": options.count,
        "seed": options.seed,
        "refused_by_syntax": counts.outcomes["syntax"],
        "refused_by_validators": counts.outcomes["validators"],
        "accepted": counts.outcomes["accepted"],
        "bugs": counts.outcomes["bug"],
        "reached_validators": round(counts.reached, 4),
        "slowest_seconds": round(counts.slowest, 3),
        "seconds": round(counts.seconds, 1),
        "peak_memory_growth_mb": round(counts.memory_growth / 1e6),
    }
    covered = ""
    if options.sample and importlib.util.find_spec("coverage"):
        found = branches(reader, options.sample, options.seed + 1)
        share = found["covered"] / max(1, found["all"])
        values |= {"validator_branches": found["all"], "validator_branches_taken": found["covered"]}
        values |= {"coverage_sample": options.sample, "branches_open": found["open"]}
        covered = f", {share:.0%} of {found['all']} validator branches taken (sample of {options.sample:,})"
    elif options.sample:
        sys.stderr.write("no branch coverage: pip install coverage\n")
    figure = (
        f"{options.count:,} inputs, {counts.reached:.0%} reached the validators, "
        f"{counts.outcomes['accepted']:,} accepted, {counts.outcomes['bug']} bugs{covered}"
    )
    print(f"{name}: {figure}; slowest {counts.slowest:.2f} s, {counts.seconds:.0f} s in all")
    for bug, times in counts.bugs.most_common():
        print(f"  {times}x {bug}")
    if not options.no_record:
        promise = f"No input to the reader of {reader.title} ends in anything but success or one clear error."
        write_record(f"fuzz_{name}", promise, "tests/fuzz/test_fuzz.py", figure, values)
    return int(counts.outcomes["bug"] > 0)


if __name__ == "__main__":
    sys.exit(main())
