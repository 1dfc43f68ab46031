"""Writes a report: one HTML page, one Markdown page, LaTeX tables, and a file per picture."""

from __future__ import annotations

from collections.abc import Collection, Sequence
from pathlib import Path

from graphlora.errors import GraphLoraError
from graphlora.records import write_text
from graphlora.report.aggregate import aggregate
from graphlora.report.names import file_name
from graphlora.report.page import html_page
from graphlora.report.plotting import Picture, rendered
from graphlora.report.reading import StudyRuns
from graphlora.report.section import GAPS, NO_GAPS, Section, study_section

FORMATS = ("html", "md", "latex", "png", "svg")


def write_report(
    studies: Sequence[StudyRuns],
    output: str | Path,
    formats: Collection[str] = FORMATS,
    reference: str | None = None,
    skipped: Sequence[str] = (),
    title: str = "GraphLoRA study report",
) -> list[Path]:
    """Write the report of some studies.

    Args:
        studies: Records of each study.
        output: Folder: `report.html`, `report.md`, `tables/` and `figures/`.
        formats: Some of `FORMATS`.
        reference: Variant to compare with; by default each study's GraphLoRA variant.
        skipped: Files that could not be read, to be named in the report.
        title: Title of the pages.

    Returns:
        The files written.

    Raises:
        GraphLoraError: Unknown format or reference, matplotlib missing, or a place that cannot be written.
    """
    unknown = sorted(set(formats) - set(FORMATS))
    if unknown or not formats:
        raise GraphLoraError(
            f"unknown format {', '.join(unknown) or '(none)'}; choose among {', '.join(FORMATS)}"
        )
    folder = Path(output)
    sections = [study_section(aggregate(study, reference)) for study in studies]
    wanted = [name for name in ("png", "svg") if name in formats]
    images = _images(sections, {*wanted, *(["svg"] if "html" in formats else [])})
    written = [
        _write_bytes(folder / "figures" / name, content)
        for name, content in images.items()
        if name.rpartition(".")[2] in wanted
    ]
    if "latex" in formats:
        written += [
            write_text(folder / "tables" / f"{file_name(f'{section.name}-{table.name}')}.tex", table.latex())
            for section in sections
            for table in section.tables
        ]
    if "md" in formats:
        shown = "png" if "png" in wanted else "svg" if "svg" in wanted else None
        written.append(write_text(folder / "report.md", markdown_page(sections, shown, skipped, title)))
    if "html" in formats:
        written.append(write_text(folder / "report.html", html_page(sections, images, skipped, title)))
    return written


def markdown_page(
    sections: Sequence[Section], image_format: str | None, skipped: Sequence[str], title: str
) -> str:
    """The report as Markdown.

    Args:
        sections: One per study.
        image_format: Format of the picture files beside it; `None` where there are none.
        skipped: Files that could not be read.
        title: Title.
    """
    lines = [f"# {title}", ""]
    if skipped:
        lines += ["Files that could not be read:", "", *(f"- {sentence}" for sentence in skipped), ""]
    for section in sections:
        lines += [f"## Study: {section.name}", "", section.summary, ""]
        if section.notes:
            lines += ["Notes on the records:", "", *(f"- {note}" for note in section.notes), ""]
        first, *others = section.tables
        lines += [f"### {first.title}", "", first.markdown()]
        for picture in section.pictures if image_format else ():
            lines += [f"### {picture.title}", "", _image(section, picture, str(image_format)), ""]
            lines += [picture.caption, ""]
        for table in others:
            lines += [f"### {table.title}", "", table.markdown()]
        lines += [f"### {GAPS}", "", *(f"- {item}" for item in section.missing or (NO_GAPS,)), ""]
        lines += ["### Provenance", "", "| | |", "|---|---|"]
        lines += [f"| {name} | {value.replace('|', ' ')} |" for name, value in section.provenance]
        lines.append("")
    return "\n".join(lines)


def _image(section: Section, picture: Picture, file_format: str) -> str:
    alt = picture.alt.replace("[", "(").replace("]", ")")
    return f"![{alt}](figures/{section.picture_file(picture, file_format)})"


def _images(sections: Sequence[Section], formats: Collection[str]) -> dict[str, bytes]:
    images = {}
    for section in sections if formats else ():
        for picture in section.pictures:
            figure = picture.draw()
            for file_format in sorted(formats):
                images[section.picture_file(picture, file_format)] = rendered(figure, file_format)
    return images


def _write_bytes(path: Path, content: bytes) -> Path:
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(content)
    except OSError as error:
        raise GraphLoraError(
            f"cannot write {path}: {error.strerror or error}; choose another place"
        ) from error
    return path
