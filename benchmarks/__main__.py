"""Command line of the benchmarks."""

from __future__ import annotations

import argparse
import importlib.util
import re
import shlex
import sys
from collections.abc import Sequence
from pathlib import Path

from benchmarks import runner
from benchmarks.cases import Case
from benchmarks.measurement import Measurement, read
from benchmarks.registry import SUITES
from benchmarks.targets import suites_of_rows
from graphlora.errors import GraphLoraError

ROOT = Path(__file__).resolve().parent.parent
RESULTS = ROOT / "benchmarks" / "results"


def main(arguments: Sequence[str] | None = None) -> int:
    """Runs a command; a user's mistake is one line and exit code 2."""
    words = sys.argv[1:] if arguments is None else list(arguments)
    options = _parser().parse_args(words)
    try:
        return options.command(options, words)
    except GraphLoraError as error:
        sys.stderr.write(f"benchmarks: error: {error}\n")
        return 2


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(prog="python -m benchmarks", description=__doc__)
    commands = parser.add_subparsers(required=True)
    run = commands.add_parser("run", help="measure cases, behind the correctness gate, within a budget")
    run.set_defaults(command=_run)
    run.add_argument("--out", type=Path, default=RESULTS, help="folder that gets a new file of measurements")
    run.add_argument(
        "--resume", action="store_true", help="leave out what is measured in --out or the results folder"
    )
    run.add_argument("--budget-seconds", type=float, default=3600.0, help="start no case that does not fit")
    run.add_argument("--device", default="auto", help="auto, cuda or cpu")
    run.add_argument("--commit", help="commit of the source, where there is no git checkout")
    listing = commands.add_parser("list", help="cases and their estimated seconds")
    listing.set_defaults(command=_list)
    for command in (run, listing):
        command.add_argument("--rows", help="rows of the target table or suites, such as 1,2,7,large")
        command.add_argument("--cases", help="regular expression found in 'suite case'")
        command.add_argument("--tiny", action="store_true", help="tiny sizes, to try the runner")
    for name, function, text in (
        ("table", _table, "print the target table"),
        ("figures", _figures, "draw the pictures and update docs/performance.md"),
        ("scaling", _scaling, "cost model of many GPUs: draw its pictures and update docs/scaling.md"),
    ):
        command = commands.add_parser(name, help=text)
        command.set_defaults(command=function)
        command.add_argument("--results", type=Path, nargs="*", default=[RESULTS], help="folders with data")
        command.add_argument("--tiny", action="store_true", help="from measurements of tiny cases")
        if name != "table":
            command.add_argument("--docs", type=Path, default=ROOT / "docs", help="folder of the page")
    return parser


def chosen_cases(rows: str | None, pattern: str | None, tiny: bool) -> list[Case]:
    """Cases of the rows whose names match.

    Raises:
        GraphLoraError: an unknown row, or nothing left.
    """
    try:
        suites = suites_of_rows(None if rows is None else rows.split(","))
    except KeyError as error:
        raise GraphLoraError(
            f"--rows: {error.args[0]!r} is unknown; give numbers of the table or {', '.join(SUITES)}"
        ) from error
    cases = [case for name in suites for case in (SUITES[name].tiny if tiny else SUITES[name].cases)]
    if pattern is not None:
        cases = [case for case in cases if re.search(pattern, f"{case.suite} {case.name}")]
    if not cases:
        raise GraphLoraError("no case is left; see `python -m benchmarks list`")
    return cases


def _run(options: argparse.Namespace, words: list[str]) -> int:
    cases = chosen_cases(options.rows, options.cases, options.tiny)
    device = _device(options.device)
    folders = [options.out, *([RESULTS] if options.out.resolve() != RESULTS else [])]
    if options.resume:
        cases = _not_measured(cases, read(folders))
    if device == "cuda":
        # The CPU's own row would waste a GPU's time.
        cases = [case for case in cases if SUITES[case.suite].device != "cpu"]
    elif not options.tiny:
        cases = [case for case in cases if SUITES[case.suite].device == "cpu"]
    out = runner.new_file(options.out)
    command = f"python -m benchmarks {shlex.join(words)}"
    plan = runner.Plan(cases, device, out, options.tiny, options.budget_seconds, options.commit, command)
    left = runner.run(plan)
    found = read([options.out]) if out.is_file() else []
    print(
        f"{out}: {runner.summary([m for m in found if m.provenance.get('command') == command])}; {left} cases left"
    )
    return 0


def _not_measured(cases: list[Case], measured: list[Measurement]) -> list[Case]:
    """The cases that `--resume` leaves; says by which commits the others were measured, which may be old ones."""
    missing = runner.missing_cases(cases, measured)
    done = {(case.suite, case.name) for case in cases} - {(case.suite, case.name) for case in missing}
    if done:
        commits = {str(m.provenance.get("commit"))[:7] for m in measured if (m.suite, m.case) in done}
        print(
            f"{len(done)} of {len(cases)} cases are measured already (commits {', '.join(sorted(commits))}); "
            "without --resume they are measured again"
        )
    return missing


def _device(name: str) -> str:
    if name != "auto":
        return name
    import torch

    return "cuda" if torch.cuda.is_available() else "cpu"


def _list(options: argparse.Namespace, words: list[str]) -> int:
    del words
    for case in chosen_cases(options.rows, options.cases, options.tiny):
        print(f"{case.seconds:6.0f} s  {case.suite:<9} {case.name}")
    return 0


def _measurements(options: argparse.Namespace) -> list[Measurement]:
    found = [m for m in read(options.results) if m.tiny == options.tiny]
    if not found:
        raise GraphLoraError(
            f"no measurements in {', '.join(map(str, options.results))}; run `python -m benchmarks run`"
        )
    return found


def _table(options: argparse.Namespace, words: list[str]) -> int:
    del words
    from benchmarks.table import target_table

    print(target_table(_measurements(options)))
    return 0


def _figures(options: argparse.Namespace, words: list[str]) -> int:
    del words
    from benchmarks.page import draw_figures, update_page

    measurements = _measurements(options)
    for path in draw_figures(measurements, options.docs / "images"):
        print(path)
    print(update_page(measurements, options.docs / "performance.md"))
    return 0


def _scaling(options: argparse.Namespace, words: list[str]) -> int:
    del words
    from benchmarks.scaling_figures import draw_figures
    from benchmarks.scaling_measured import read_two_gpus
    from benchmarks.scaling_page import update_page

    measurements = [m for m in read(options.results) if m.tiny == options.tiny]
    for path in draw_figures(measurements, options.docs / "images"):
        print(path)
    two_gpus = read_two_gpus(ROOT / "results" / "reliability" / "two_gpus.json")
    print(update_page(measurements, two_gpus, options.docs / "scaling.md"))
    return 0


if __name__ == "__main__":
    if importlib.util.find_spec("graphlora") is None:
        sys.exit("graphlora is not installed: pip install -e . , or set PYTHONPATH=src")
    sys.exit(main())
