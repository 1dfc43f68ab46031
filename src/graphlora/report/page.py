"""The report as one HTML page that needs nothing else: no network, no scripts, pictures inside."""

from __future__ import annotations

import base64
import html
import re
from collections.abc import Mapping, Sequence

from graphlora.report.plotting import Picture
from graphlora.report.section import GAPS, NO_GAPS, Section
from graphlora.report.tables import Table

STYLE = """
:root { color-scheme: light; --ink: #1c1c1c; --soft: #555; --line: #cfcfcf; --link: #00518a; }
* { box-sizing: border-box; }
body { margin: 0 auto; padding: 1rem 1.25rem 4rem; max-width: 70rem; color: var(--ink); background: #fff;
  font: 1rem/1.5 system-ui, "Segoe UI", Roboto, "Helvetica Neue", Arial, sans-serif; overflow-wrap: anywhere; }
h1 { font-size: 1.8rem; line-height: 1.2; margin: 1rem 0 .5rem; }
h2 { font-size: 1.4rem; margin: 2.5rem 0 .5rem; padding-top: .75rem; border-top: 2px solid var(--ink); }
h3 { font-size: 1.1rem; margin: 1.75rem 0 .25rem; }
a { color: var(--link); }
a:focus-visible, .scroll:focus-visible { outline: 3px solid var(--link); outline-offset: 2px; }
.skip { position: absolute; left: -99rem; } .skip:focus { position: static; }
nav ul { columns: 16rem; padding-left: 1.2rem; }
.scroll { overflow-x: auto; margin: .5rem 0 0; }
table { border-collapse: collapse; font-variant-numeric: tabular-nums; font-size: .9rem; }
caption, figcaption { text-align: left; color: var(--soft); font-size: .9rem; max-width: 60rem;
  padding: .25rem 0 .5rem; }
.caption { color: var(--soft); font-size: .9rem; margin: .25rem 0; max-width: 60rem; }
th, td { padding: .25rem .7rem; text-align: right; white-space: nowrap; border-bottom: 1px solid var(--line); }
thead th { border-bottom: 2px solid var(--ink); vertical-align: bottom; }
tbody th { font-weight: 400; position: sticky; left: 0; background: #fff; }
.text { text-align: left; }
tbody tr:hover { background: #f2f6fa; }
figure { margin: .5rem 0 1.5rem; }
figure img { display: block; width: 100%; height: auto; min-width: 36rem; }
.notes li { margin: .15rem 0; }
.provenance td { white-space: normal; text-align: left; }
@media print {
  body { max-width: none; padding: 0; font-size: 10pt; } nav, .skip { display: none; }
  figure, tr { break-inside: avoid; } h2, h3 { break-after: avoid; } .scroll { overflow: visible; }
  table { font-size: 7.5pt; } th, td { padding: .1rem .35rem; }
  figure img { min-width: 0; width: auto; max-width: 100%; max-height: 11cm; }
  a { color: inherit; text-decoration: none; }
}
"""


def html_page(
    sections: Sequence[Section], images: Mapping[str, bytes], skipped: Sequence[str], title: str
) -> str:
    """The whole page.

    Args:
        sections: One per study.
        images: SVG of each picture, by `Section.picture_file`.
        skipped: Files that could not be read, a sentence each.
        title: Title of the page.

    Returns:
        HTML text; equal for equal records.
    """
    body = "\n".join(_section(section, images) for section in sections)
    links = "\n".join(_links(section) for section in sections)
    problems = _problems(skipped)
    return f"""<!DOCTYPE html>
<html lang="en">
<head>
<meta charset="utf-8">
<meta name="viewport" content="width=device-width, initial-scale=1">
<title>{_text(title)}</title>
<style>{STYLE}</style>
</head>
<body>
<a class="skip" href="#content">Skip to the results</a>
<header>
<h1>{_text(title)}</h1>
<p>Means and standard deviations are over seeds. A single difference among many is easily chance: the
comparison tables hold p values corrected for their number, and each picture says what its bars mean.</p>
</header>
<nav aria-label="Contents">
<ul>
{links}
</ul>
</nav>
<main id="content">
{problems}{body}
</main>
</body>
</html>
"""


def _section(section: Section, images: Mapping[str, bytes]) -> str:
    parts = [
        f'<section id="{_id(section.name)}">',
        f"<h2>Study: {_text(section.name)}</h2>",
        f"<p>{_text(section.summary)}</p>",
    ]
    if section.notes:
        parts.append(_list("Notes on the records", section.notes, f"{section.name}-notes"))
    first, *others = section.tables
    parts.append(_table(section, first))
    parts += [
        _figure(section, picture, images[section.picture_file(picture, "svg")])
        for picture in section.pictures
    ]
    parts += [_table(section, table) for table in others]
    parts.append(_list(GAPS, section.missing or [NO_GAPS.replace("`", "")], f"{section.name}-missing"))
    parts.append(_provenance(section))
    parts.append("</section>")
    return "\n".join(parts)


def _table(section: Section, table: Table) -> str:
    heads = "".join(
        f'<th scope="col"{_class(index, table)}>{_text(column)}</th>'
        for index, column in enumerate(table.columns)
    )
    rows = "\n".join(
        "<tr>" + "".join(_cell(table, r, c, cell) for c, cell in enumerate(row)) + "</tr>"
        for r, row in enumerate(table.rows)
    )
    name = _id(f"{section.name}-{table.name}")
    return f"""<h3 id="{name}">{_text(table.title)}</h3>
<p class="caption" id="{name}-caption">{_text(table.caption)}</p>
<div class="scroll" tabindex="0" role="region" aria-labelledby="{name}">
<table aria-describedby="{name}-caption">
<thead><tr>{heads}</tr></thead>
<tbody>
{rows}
</tbody>
</table>
</div>"""


def _cell(table: Table, row: int, column: int, cell: str) -> str:
    text = f"<strong>{_text(cell)}</strong>" if (row, column) in table.strong else _text(cell)
    if column == table.labels - 1:
        return f'<th scope="row" class="text">{text}</th>'
    return f"<td{_class(column, table)}>{text}</td>"


def _class(column: int, table: Table) -> str:
    return ' class="text"' if column < table.labels else ""


def _figure(section: Section, picture: Picture, image: bytes) -> str:
    data = base64.b64encode(image).decode()
    name = _id(f"{section.name}-{picture.name}")
    return f"""<h3 id="{name}-figure">{_text(picture.title)}</h3>
<figure>
<div class="scroll" tabindex="0" role="region" aria-labelledby="{name}-figure">
<img src="data:image/svg+xml;base64,{data}" alt="{_text(picture.alt)}">
</div>
<figcaption>{_text(picture.caption)}</figcaption>
</figure>"""


def _list(title: str, sentences: Sequence[str], name: str) -> str:
    items = "\n".join(f"<li>{_text(sentence)}</li>" for sentence in sentences)
    return f'<h3 id="{_id(name)}">{_text(title)}</h3>\n<ul class="notes">\n{items}\n</ul>'


def _provenance(section: Section) -> str:
    rows = "\n".join(
        f'<tr><th scope="row" class="text">{_text(name)}</th><td>{_text(value)}</td></tr>'
        for name, value in section.provenance
    )
    return f"""<h3 id="{_id(f"{section.name}-provenance")}">Provenance</h3>
<table class="provenance"><tbody>
{rows}
</tbody></table>"""


def _links(section: Section) -> str:
    first, *others = section.tables
    inner = [(f"{section.name}-{first.name}", first.title)]
    inner += [(f"{section.name}-{picture.name}-figure", picture.title) for picture in section.pictures]
    inner += [(f"{section.name}-{table.name}", table.title) for table in others]
    inner += [(f"{section.name}-missing", GAPS), (f"{section.name}-provenance", "Provenance")]
    items = "".join(f'<li><a href="#{_id(name)}">{_text(title)}</a></li>' for name, title in inner)
    return f'<li><a href="#{_id(section.name)}">{_text(section.name)}</a><ul>{items}</ul></li>'


def _problems(skipped: Sequence[str]) -> str:
    return _list("Files that could not be read", skipped, "skipped-files") + "\n" if skipped else ""


def _id(name: str) -> str:
    return re.sub(r"[^a-z0-9]+", "-", name.lower()).strip("-") or "section"


def _text(text: str) -> str:
    return html.escape(text, quote=True)
