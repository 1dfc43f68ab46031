"""The written report: tables, pictures and page of a whole invented study, and of the smallest one."""

import io
import re
import subprocess
import sys
from html.parser import HTMLParser

import numpy as np
import pytest
from matplotlib import image
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.text import Text
from study_records import METHODS, study_record, sweep_records, table_records, write_records

from graphlora.errors import GraphLoraError
from graphlora.report.aggregate import aggregate
from graphlora.report.figures_cost import side_by_side, size_families
from graphlora.report.figures_curves import curve_band
from graphlora.report.inference import VarianceRatio
from graphlora.report.numerals import p_text, ratio_text, signed
from graphlora.report.plotting import rendered, styles
from graphlora.report.reading import read_studies
from graphlora.report.section import study_section
from graphlora.report.tables import Table, latex_text
from graphlora.report.writing import write_report

VOID = {"meta", "img", "br", "link"}


class Page(HTMLParser):
    """Checks that elements close in order, and collects what the tests ask for."""

    def __init__(self, text):
        super().__init__()
        self.open, self.ids, self.links, self.images, self.text = [], [], [], [], []
        self.outside = []
        self.feed(text)
        self.close()

    def handle_starttag(self, tag, attributes):
        values = dict(attributes)
        if tag not in VOID:
            self.open.append(tag)
        if "id" in values:
            self.ids.append(values["id"])
        if tag == "a":
            self.links.append(values["href"])
        if tag == "img":
            self.images.append(values)
        self.outside += [value for name, value in attributes if name in ("src", "href") and "//" in value[:8]]
        for name in ("aria-labelledby", "aria-describedby"):
            if name in values:
                self.links.append("#" + values[name])

    def handle_endtag(self, tag):
        assert self.open.pop() == tag

    def handle_data(self, data):
        self.text.append(data)


def section_of(records, folder, study=None):
    write_records(records, folder)
    (found,), _ = read_studies(folder, study)
    return study_section(aggregate(found))


@pytest.fixture(scope="module")
def whole(tmp_path_factory):
    """Folder of the report of an invented study with everything."""
    folder = tmp_path_factory.mktemp("whole")
    write_records(table_records(seeds=range(3)) + sweep_records(seeds=range(2), tasks={"quiz": 40}), folder)
    studies, skipped = read_studies(folder)
    write_report(studies, folder / "report", skipped=[*skipped, "skipped: half.json: broken JSON"])
    return folder / "report"


def test_the_page_is_well_formed_complete_and_stands_alone(whole):
    page = Page((whole / "report.html").read_text(encoding="utf-8"))
    assert page.open == []
    assert len(set(page.ids)) == len(page.ids)
    assert {link[1:] for link in page.links} <= set(page.ids)
    assert all(link.startswith("#") for link in page.links)
    assert page.outside == []
    assert all(len(values["alt"]) > 40 for values in page.images)
    assert all(values["src"].startswith("data:image/svg+xml;base64,") for values in page.images)
    text = " ".join(page.text)
    for heading in ("Differences to GraphLoRA", "Sensitivity", "Accuracy against cost", "Training curves"):
        assert heading in text
    for heading in (
        "Load balance by layer",
        "Dead experts",
        "Provenance",
        "Gaps among these records",
        "half.json",
    ):
        assert heading in text
    assert text.index("Study: table1") < text.index("Study: sensitivity")


def test_names_with_markup_are_shown_as_text(tmp_path):
    write_records([study_record("<b>&lora", "quiz", 0, 50)], tmp_path)
    studies, _ = read_studies(tmp_path)
    write_report(studies, tmp_path / "out", formats=["html"])
    text = (tmp_path / "out" / "report.html").read_text(encoding="utf-8")
    assert "&lt;b&gt;&amp;lora" in text
    assert "<b>" not in text


def test_every_picture_is_written_and_shows_something(whole):
    names = {path.name for path in (whole / "figures").iterdir()}
    expected = {"scores", "differences", "efficiency", "curves", "balance", "experts"}
    expected = {f"table1-{name}" for name in expected} | {"sensitivity-sensitivity"}
    assert names == {f"{name}.{ending}" for name in expected for ending in ("png", "svg")}
    for name in expected:
        pixels = image.imread(whole / "figures" / f"{name}.png")
        assert pixels.shape[1] > 1200
        ink = (pixels[..., :3] < 0.9).any(axis=-1)
        assert 0.01 < ink.mean() < 0.6
        # Every quarter of the picture holds something.
        halves = [part for half in np.array_split(ink, 2) for part in np.array_split(half, 2, axis=1)]
        assert all(part.any() for part in halves)


def test_captions_say_seeds_and_bars(tmp_path):
    pictures = section_of(table_records(seeds=range(3)), tmp_path).pictures
    assert len(pictures) == 6
    for picture in pictures:
        assert "3 seeds" in picture.caption
        assert re.search(r"[Bb]ars?:|[Bb]and:|[Ee]rror bars", picture.caption)


def test_the_smallest_study_has_a_report_without_intervals(tmp_path):
    section = section_of(
        [study_record("graphlora", "quiz", 0, 60), study_record("lora", "quiz", 0, 50)], tmp_path
    )
    assert [picture.name for picture in section.pictures] == ["scores", "differences"]
    assert all("One seed each" in picture.caption for picture in section.pictures)
    assert section.tables[0].rows == (("LoRA", "50.00"), ("GraphLoRA", "60.00"))
    comparison = section.tables[1].rows[0]
    assert comparison == ("quiz", "LoRA", "1", "50.00", "–", "–", "−10.00", "–", "1", "–", "–", "–")
    for picture in section.pictures:
        assert image.imread(io.BytesIO(rendered(picture.draw(), "png"))).std() > 0.01


def test_pictures_of_equal_numbers_are_equal_files(tmp_path):
    picture = section_of(
        [study_record("lora", "quiz", seed, 50 + seed) for seed in range(3)], tmp_path
    ).pictures[0]
    assert rendered(picture.draw(), "svg") == rendered(picture.draw(), "svg")
    assert rendered(picture.draw(), "png") == rendered(picture.draw(), "png")


def _shown(figure):
    """The texts of a figure that are drawn, with their boxes."""
    figure.canvas.draw()
    renderer = figure.canvas.get_renderer()
    hidden = set()
    for axes in figure.axes:
        for axis in (axes.xaxis, axes.yaxis):
            # Matplotlib keeps labels of ticks that it does not draw, beyond the ends of an axis.
            low, high = sorted(axis.get_view_interval())
            hidden |= {t.label1 for t in axis.get_major_ticks() if not low <= t.get_loc() <= high}
        if not axes.axison:
            hidden |= set(axes.findobj(Text))
    found = [
        (t.get_text(), t.get_window_extent(renderer))
        for t in figure.findobj(Text)
        if t.get_text().strip() and t.get_visible() and t not in hidden
    ]
    return [(text, box) for text, box in found if box.width > 1]


def _overlaps(figure):
    """Pairs of texts of a figure that lie on each other."""
    boxes = [(text, box.shrunk(0.96, 0.9)) for text, box in _shown(figure)]
    return [
        (a, b) for i, (a, first) in enumerate(boxes) for b, other in boxes[i + 1 :] if first.overlaps(other)
    ]


def _outside(figure):
    """Texts that leave their figure by more than a pixel."""
    whole = figure.bbox.padded(1)
    return [
        text
        for text, b in _shown(figure)
        if b.x0 < whole.x0 or b.x1 > whole.x1 or b.y0 < whole.y0 or b.y1 > whole.y1
    ]


def test_no_text_lies_on_another_or_leaves_the_page_and_alt_texts_are_short(tmp_path):
    many = METHODS | {f"mixlora_wide_{n}": (15 + n, 1, 3.0 * n, 0.5) for n in range(1, 8)}
    for name, records in {
        "many": table_records(
            methods=many, tasks={"arc_challenge": 25, "boolq_no_passage": 41}, seeds=[0, 1]
        ),
        "sweep": sweep_records(seeds=[0, 1]),
        "one": table_records(seeds=[0], tasks={"quiz": 40}),
    }.items():
        for picture in section_of(records, tmp_path / name).pictures:
            figure = picture.draw()
            FigureCanvasAgg(figure)
            assert _overlaps(figure) == [], f"{name}: {picture.name}"
            assert _outside(figure) == [], f"{name}: {picture.name}"
            assert len(picture.alt) < 320, picture.name


def test_marks_of_equal_cost_stand_side_by_side():
    places = side_by_side([10.0, 0.0, 10.0, 10.0])
    assert places[1] == pytest.approx(0)
    assert np.diff(sorted(places))[1:] == pytest.approx([0.22, 0.22])
    assert sum(places[i] for i in (0, 2, 3)) / 3 == pytest.approx(10)
    assert side_by_side([1.0, 10.0, 100.0], log=True) == pytest.approx([1, 10, 100])
    assert len(set(side_by_side([3.0, 3.0]))) == 2


def test_one_method_at_several_ranks_is_a_family():
    names = ["lora_r8", "lora_r64", "mola_r2", "graphlora", "graphlora_r2", "graphlora_no_graph"]
    assert size_families(names) == [["lora_r8", "lora_r64"], ["graphlora_r2", "graphlora"]]


def test_no_two_methods_look_alike_without_color():
    look = styles([f"m{n}" for n in range(20)], "m0")
    assert len({(style.color, style.marker) for style in look.values()}) == 20
    assert len({(style.color, style.line) for style in look.values()}) == 20


def test_curves_are_means_and_ranges_over_seeds(tmp_path):
    curves = [[{"step": 1, "loss": 2.0}, {"step": 2, "loss": 1.0}, {"step": 3}], [{"step": 1, "loss": 4.0}]]
    write_records([study_record("lora", "quiz", s, 50, curve=c) for s, c in enumerate(curves)], tmp_path)
    (study,), _ = read_studies(tmp_path)
    assert curve_band(study.runs, ("loss",)) == [(1, 3.0, 2.0, 4.0), (2, 1.0, 1.0, 1.0)]


@pytest.mark.parametrize(("count", "reference", "bands"), [(4, True, 4), (5, True, 1), (5, False, 0)])
def test_many_methods_have_no_bands_that_hide_their_lines(tmp_path, count, reference, bands):
    methods = [*(["graphlora"] if reference else []), *(f"m{n}" for n in range(5))][:count]
    records = [
        study_record(
            m, "quiz", seed, 50, curve=[{"step": s, "loss": 1.0 + seed} for s in (1, 2)], method="lora"
        )
        for m in methods
        for seed in (0, 1)
    ]
    (picture,) = [p for p in section_of(records, tmp_path).pictures if p.name.startswith("curves")]
    (axes,) = picture.draw().axes
    assert len(axes.lines) == count and len(axes.collections) == bands
    assert ("lowest to the highest seed." in picture.caption) == (bands == 4)
    assert ("seed of GraphLoRA (those" in picture.caption) == (bands == 1)


@pytest.mark.parametrize(("loss", "scale"), [(1.3, "linear"), (40.0, "log")])
def test_curves_that_end_far_apart_are_on_a_logarithmic_scale(tmp_path, loss, scale):
    records = [
        study_record(method, "quiz", 0, 50, curve=[{"step": 1, "loss": 9.0}, {"step": 2, "loss": end}])
        for method, end in (("lora", 1.0), ("graphlora", loss))
    ]
    section = section_of(records, tmp_path)
    (picture,) = [picture for picture in section.pictures if picture.name.startswith("curves")]
    (axes,) = picture.draw().axes
    assert axes.get_yscale() == scale
    assert ("log scale" in axes.get_title()) == (scale == "log")


def test_tables_as_markdown_and_latex():
    table = Table("t", "T", "50% ± 1", ("a_b", "p"), (("x|y", "<0.001"), ("z", "−1 †")), frozenset({(1, 1)}))
    assert table.markdown().splitlines()[2:] == [
        "| a_b | p |",
        "| --- | ---: |",
        r"| x\|y | <0.001 |",
        "| z | **−1 †** |",
    ]
    latex = table.latex()
    assert r"\caption{50\% $\pm$ 1}" in latex
    assert r"    a\_b & p \\" in latex
    assert r"    z & \textbf{$-$1 $\dagger$} \\" in latex
    assert latex.count(r"\begin") == latex.count(r"\end") == 2
    assert latex_text(r"\{") == r"\textbackslash{}\{"


def test_numbers_as_text():
    assert signed(-0.001) == "0.00"
    assert signed(-1.5) == "−1.50"
    assert p_text(0.0004) == "<0.001"
    assert ratio_text(VarianceRatio(1.834, 0.19, 1234.0)) == "1.83 [0.19, 1,234]"
    assert ratio_text(VarianceRatio(float("inf"), 0.0, float("inf"))) == "∞ [0.00, ∞]"
    assert ratio_text(None) == "–"


def test_marked_records_are_marked_in_the_table(tmp_path):
    write_records(
        [study_record("lora", "quiz", 0, 50), study_record("dora", "quiz", 0, 50, dirty=True)], tmp_path
    )
    (study,), _ = read_studies(tmp_path, include_dirty=True)
    assert study_section(aggregate(study)).tables[0].rows == (("LoRA", "50.00"), ("DoRA", "50.00†"))


def test_formats_are_chosen_and_checked(tmp_path):
    write_records([study_record("lora", "quiz", 0, 50)], tmp_path)
    studies, _ = read_studies(tmp_path)
    written = write_report(studies, tmp_path / "out", formats=["md", "latex"])
    assert sorted(path.name for path in written) == [
        "report.md",
        "table1-comparison.tex",
        "table1-cost.tex",
        "table1-scores.tex",
    ]
    assert "![" not in (tmp_path / "out" / "report.md").read_text(encoding="utf-8")
    with pytest.raises(GraphLoraError, match="unknown format pdf; choose among html, md, latex, png, svg"):
        write_report(studies, tmp_path / "out", formats=["html", "pdf"])
    (tmp_path / "file").write_text("")
    with pytest.raises(GraphLoraError, match="cannot write"):
        write_report(studies, tmp_path / "file", formats=["png"])


def test_reports_need_no_torch_and_tables_no_matplotlib(tmp_path):
    write_records([study_record("lora", "quiz", 0, 50)], tmp_path)
    code = (
        "import sys; sys.modules['torch'] = sys.modules['transformers'] = sys.modules['matplotlib'] = None\n"
        "from graphlora.report.reading import read_studies\n"
        "from graphlora.report.writing import write_report\n"
        f"studies, _ = read_studies({str(tmp_path)!r})\n"
        f"write_report(studies, {str(tmp_path / 'out')!r}, formats=['md', 'latex'])\n"
    )
    subprocess.run([sys.executable, "-c", code], check=True)
