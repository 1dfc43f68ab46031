"""What single pictures of a study show, and that their captions say it."""

from dataclasses import replace

import pytest
from matplotlib.colors import to_hex
from study_records import METHODS, study_record, sweep_records, table_records, write_records

from graphlora.report.aggregate import aggregate
from graphlora.report.figures_balance import BALANCED
from graphlora.report.plotting import BLUE, VERMILION
from graphlora.report.reading import read_studies
from graphlora.report.section import study_section
from graphlora.report.writing import write_report

MANY = METHODS | {f"mixlora_wide_{n}": (15 + n, 1, 3.0 * n, 0.5) for n in range(1, 8)}
GRAY = "#bdbdbd"


def picture_of(records, folder, name):
    write_records(records, folder)
    (study,), _ = read_studies(folder)
    (picture,) = [found for found in study_section(aggregate(study)).pictures if found.name == name]
    return picture


@pytest.mark.parametrize(("methods", "shape"), [(METHODS, (2, 3)), (MANY, (3, 4))])
def test_each_method_has_its_panel_of_balance_on_a_log_scale_with_the_bound(tmp_path, methods, shape):
    picture = picture_of(table_records(methods=methods, seeds=[0, 1]), tmp_path, "balance")
    figure = picture.draw()
    mixtures = [name for name, (_, _, _, imbalance) in methods.items() if imbalance is not None]
    upper = [axes for axes in figure.axes if axes.get_yscale() == "log"]
    lower = [axes for axes in figure.axes if axes.get_ylim() == (-0.03, 1.06)]
    titles = [axes.get_title() for axes in upper]
    assert len(set(titles)) == len(titles) == len(mixtures)
    assert [axes.get_title() for axes in lower] == titles
    rows, columns = shape
    assert figure.axes[0].get_gridspec().get_geometry() == (2 * rows, columns)
    reference = titles.index("GraphLoRA")
    for index, axes in enumerate(upper):
        assert axes.lines[-1].get_ydata() == [BALANCED, BALANCED]
        if index % columns == 0:
            assert "0.25" in [label.get_text() for label in axes.get_yticklabels()]
        assert len({line.get_color() for line in axes.lines}) == len(axes.lines) == 5 - (index == reference)
        assert axes.get_ylim() == upper[0].get_ylim()
    assert "logarithmic" in picture.caption
    assert "at 0.25" in picture.caption
    assert "Gray: GraphLoRA" in picture.caption


def test_a_layer_of_perfect_balance_stands_at_the_lower_end(tmp_path):
    block = {"expert_load": [0.5, 0.5], "entropy": 1.0, "load_cv": 0.0, "dead_experts": 0}
    uneven = block | {"load_cv": 0.4}
    routing = {"model.layers.0.mlp": block, "model.layers.1.mlp": uneven}
    records = [study_record("graphlora", "quiz", seed, 50, routing=routing) for seed in (0, 1)]
    picture = picture_of(records, tmp_path, "balance")
    axes = picture.draw().axes[0]
    assert axes.lines[0].get_ydata() == pytest.approx([0.01, 0.4])
    assert axes.get_ylim()[0] < 0.01
    assert "Variation below 0.01 stands at 0.01." in picture.caption


def test_of_many_methods_a_few_have_a_color_and_the_axes_fit_them(tmp_path):
    records = table_records(methods=MANY, seeds=[0, 1])
    far = [{"step": step, "loss": 500.0} for step in (10, 140)]
    records = [
        replace(r, metrics=r.metrics | {"curve": far}) if r.variant == "graphlora_no_graph" else r
        for r in records
    ]
    picture = picture_of(records, tmp_path, "curves")
    figure = picture.draw()
    labels = [text.get_text() for text in figure.legends[0].get_texts()]
    assert labels[-1] == "others"
    assert len(labels) == 6
    assert {"GraphLoRA", "MixLoRA wide 7", "MixLoRA wide 6"} < set(labels)
    colors = [line.get_color() for line in figure.legends[0].get_lines()]
    assert len(set(colors)) == len(colors)
    for axes in figure.axes:
        assert {line.get_color() for line in axes.lines} == set(colors)
        assert axes.get_ylim()[1] < 100
        assert axes.get_yscale() == "linear"
    assert (
        "In color: GraphLoRA and the 2 methods of highest and 2 of lowest score; gray: the other 9"
        in picture.caption
    )


def test_up_to_eight_methods_all_have_a_color(tmp_path):
    picture = picture_of(table_records(seeds=[0, 1]), tmp_path, "curves")
    (drawn,) = picture.draw().legends
    assert len(drawn.get_texts()) == len({line.get_color() for line in drawn.get_lines()}) == len(METHODS)
    assert "gray" not in picture.caption


def test_marks_of_tasks_stand_beside_that_of_their_average(tmp_path):
    picture = picture_of(sweep_records(seeds=[0, 1]), tmp_path, "sensitivity")
    for axes in picture.draw().axes:
        places = {}
        for line in axes.lines:
            if line.get_marker() in "s^D":
                places[line.get_marker()] = {round(x % 1, 3) for x in line.get_xdata()}
        assert len(places) == 3
        assert all(len(found) == 1 for found in places.values())
        assert len(set.union(*places.values())) == 3
        assert 0.0 not in set.union(*places.values())
    assert "beside it: single tasks" in picture.caption


@pytest.mark.parametrize(("metric", "better"), [("acc_norm", BLUE), ("loss", VERMILION)])
def test_colors_of_differences_say_better_or_worse_and_the_caption_says_so(tmp_path, metric, better):
    records = []
    for variant, gain in (("graphlora", 0), ("lora", 9), ("dora", -9), ("mixlora", 0)):
        for seed in range(3):
            score = 50 + gain + seed + 0.1 * seed * (gain > 0) + (seed - 1) * (variant == "mixlora")
            record = study_record(variant, "quiz", seed, score, metric=metric)
            record.metrics["test"]["quiz"]["loss"] = score
            records.append(record)
    picture = picture_of(records, tmp_path, "differences")
    (axes,) = picture.draw().axes
    colors = dict(
        zip(
            [label.get_text() for label in axes.get_yticklabels()],
            [to_hex(bar.get_facecolor()) for bar in axes.patches],
            strict=True,
        )
    )
    worse = VERMILION if better == BLUE else BLUE
    assert colors == {"LoRA": better.lower(), "DoRA": worse.lower(), "MixLoRA": GRAY}
    assert "blue (better than GraphLoRA) or orange (worse)" in picture.caption
    assert f"{'Right' if metric == 'acc_norm' else 'Left'} of zero: better" in picture.caption


def test_sizes_that_hardly_differ_are_not_blown_up(tmp_path):
    sizes = {"graphlora": 14_701_500, "lora": 14_702_340, "dora": 14_701_500}
    records = [
        study_record(variant, "quiz", seed, 50 + seed, num_trained=size)
        for variant, size in sizes.items()
        for seed in (0, 1)
    ]
    (axes,) = picture_of(records, tmp_path, "efficiency").draw().axes
    low, high = axes.get_xlim()
    assert low < 13.3e6
    assert high > 16.1e6


def test_gaps_are_named_as_those_of_the_records(tmp_path):
    write_records(table_records(seeds=[0, 1]), tmp_path)
    (study,), _ = read_studies(tmp_path)
    write_report([study], tmp_path / "out", formats=["md", "html"])
    for name in ("report.md", "report.html"):
        text = (tmp_path / "out" / name).read_text(encoding="utf-8")
        assert "Gaps among these records" in text
        assert "None: every method has each task and seed that another one has." in text
        assert "What is missing" not in text
