"""Command line: the table of promises, and the commands that measure them."""

from __future__ import annotations

import argparse
import importlib.util
import re
import shlex
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from graphlora.errors import GraphLoraError
from graphlora.records import write_text
from reliability.promises import PROMISES, Promise
from reliability.record import RESULTS, ROOT, read_records

PAGE = ROOT / "docs" / "reliability.md"
BEGIN, END = "<!-- begin promises -->", "<!-- end promises -->"
NOT_RUN = "not run"
OTHER = "Further"


def main(arguments: Sequence[str] | None = None) -> int:
    """Prints the table and renews the page, or measures promises; a user's mistake is one line and exit code 2."""
    options = _parser().parse_args(arguments)
    try:
        return options.command(options)
    except GraphLoraError as error:
        sys.stderr.write(f"reliability: error: {error}\n")
        return 2


def table(records: dict[str, dict[str, Any]]) -> str:
    """The table of all promises, Markdown; one without a record is "not run", records without a promise come last."""
    known = {promise.name for promise in PROMISES}
    rest = [Promise(OTHER, name, "") for name in records if name not in known]
    lines: list[str] = []
    topic = None
    for promise in (*PROMISES, *rest):
        if promise.topic != topic:
            topic = promise.topic
            lines += ["", f"**{topic}**", "", "| promise | test | figure | measured |", "|---|---|---|---|"]
        lines.append(_row(promise, records.get(promise.name)))
    return "\n".join(lines).strip("\n")


def update_page(page: Path, text: str) -> Path:
    """Puts the table between the page's markers.

    Raises:
        GraphLoraError: The page or its markers are missing.
    """
    try:
        before, begin, rest = page.read_text(encoding="utf-8").partition(BEGIN)
    except OSError as error:
        raise GraphLoraError(f"cannot read {page}: {error.strerror}; name the page with --page") from error
    _, end, after = rest.partition(END)
    if not (begin and end):
        raise GraphLoraError(f"{page} has no lines {BEGIN!r} and {END!r}; put them where the table belongs")
    return write_text(page, f"{before}{BEGIN}\n{text}\n{END}{after}")


def _row(promise: Promise, record: dict[str, Any] | None) -> str:
    if record is None:
        command = promise.by_hand or f"python -m reliability run {promise.name}"
        return f"| {promise.text} | `{command}` | {NOT_RUN} | |"
    test = record["test"] if "`" in record["test"] else f"`{record['test']}`"
    measured = f"{record['date']}, {record['machine']}, {record['commit']}: `{record['command']}`"
    cells = (record["promise"], test, record["figure"], measured)
    return f"| {' | '.join(map(_cell, cells))} |"


def _cell(text: str) -> str:
    return re.sub(r"\s+", " ", text).replace("|", r"\|")


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(prog="python -m reliability", description=__doc__)
    parser.add_argument("--results", type=Path, default=RESULTS, help="folder of the records")
    parser.add_argument("--page", type=Path, default=PAGE, help="page that holds the table")
    parser.set_defaults(command=_print)
    run = parser.add_subparsers().add_parser(
        "run", help="measure promises at full size, then print the table"
    )
    run.add_argument("names", nargs="+", metavar="NAME", help="names of promises, or all")
    run.set_defaults(command=_run)
    return parser


def _print(options: argparse.Namespace) -> int:
    text = table(read_records(options.results))
    print(text)
    update_page(options.page, text)
    return 0


def _run(options: argparse.Namespace) -> int:
    failed = []
    for promise in _chosen(options.names):
        if promise.by_hand:
            print(f"{promise.name}: needs GPUs; run there: {promise.by_hand}")
            continue
        words = shlex.split(promise.command or promise.name)
        if importlib.util.find_spec(f"reliability.{words[0]}") is None:
            print(f"{promise.name}: no command measures it alone; see docs/reliability.md")
            continue
        print(f"{promise.name}: python -m reliability.{shlex.join(words)}", flush=True)
        done = subprocess.run([sys.executable, "-m", f"reliability.{words[0]}", *words[1:]], cwd=ROOT)
        if done.returncode:
            failed.append(promise.name)
    _print(options)
    if failed:
        raise GraphLoraError(f"failed: {', '.join(failed)}; see their output above")
    return 0


def _chosen(names: list[str]) -> list[Promise]:
    by_name = {promise.name: promise for promise in PROMISES}
    if names == ["all"]:
        return list(PROMISES)
    for name in names:
        if name not in by_name:
            raise GraphLoraError(f"no promise {name!r}; choose from all, {', '.join(by_name)}")
    return [by_name[name] for name in names]


if __name__ == "__main__":
    sys.exit(main())
