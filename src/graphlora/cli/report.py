"""`graphlora report`: tables, pictures and one page from the records of studies."""

from __future__ import annotations

import sys
from pathlib import Path

from jsonargparse import ArgumentParser, Namespace

from graphlora.cli.parsing import make_parser

DESCRIPTION = """\
Make a report from the records of studies: scores with standard deviations and intervals over seeds, paired
comparisons with a reference, stability as a ratio of variances, costs, routing health, and pictures of all
of them, as one HTML page that needs nothing else, as Markdown, as LaTeX tables and as PNG and SVG files.

Records of a tree with uncommitted changes, and of other commits than the one of most records, are left out
and counted; --include_dirty and --all_commits keep and mark them. Needs matplotlib (pip install
'graphlora[plots]') for html, png and svg. Reads records only: no model, no torch, no GPU."""
EXAMPLE = """
graphlora report results
graphlora report results --study table1 --output docs/table1
graphlora report results/mine --reference lora --format html,md
"""


def build_parser() -> ArgumentParser:
    """Parser of the command."""
    parser = make_parser("graphlora report RESULTS [options]", DESCRIPTION, EXAMPLE)
    parser.add_argument("results", type=str, help="folder with the records, at any depth")
    parser.add_argument(
        "--study", type=str | None, default=None, help="the one study to report; left out: every study there"
    )
    parser.add_argument(
        "--output", type=str | None, default=None, help="folder for the report; left out: RESULTS/report"
    )
    parser.add_argument(
        "--format",
        type=str,
        default="html,md,latex,png,svg",
        help="what to write, with commas between: html, md, latex, png, svg",
    )
    parser.add_argument(
        "--reference",
        type=str | None,
        default=None,
        help="variant that the others are compared with; left out: the GraphLoRA variant",
    )
    parser.add_argument(
        "--include_dirty", action="store_true", help="keep records of a tree with uncommitted changes, marked"
    )
    parser.add_argument("--all_commits", action="store_true", help="keep records of other commits, marked")
    parser.add_argument("--title", type=str, default="GraphLoRA study report", help="title of the pages")
    return parser


def run(arguments: Namespace) -> None:
    """Write the report and say what it is made of."""
    from graphlora.report.reading import read_studies
    from graphlora.report.writing import write_report

    studies, skipped = read_studies(
        arguments.results, arguments.study, arguments.include_dirty, arguments.all_commits
    )
    for sentence in skipped:
        sys.stderr.write(f"graphlora: {sentence}\n")
    for study in studies:
        print(f"{study.name}: {len(study.runs)} records")
        for note in study.notes:
            print(f"  {note}")
    results = Path(arguments.results)
    default = (results.parent if results.is_file() else results) / "report"
    written = write_report(
        studies,
        arguments.output or default,
        [name.strip() for name in arguments.format.split(",") if name.strip()],
        arguments.reference,
        skipped,
        arguments.title,
    )
    pages = [path for path in written if path.name.startswith("report.")]
    print(
        f"wrote {len(written)} files in {arguments.output or default}"
        + "".join(f"\n  {page}" for page in pages)
    )
