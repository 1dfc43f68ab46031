"""Pictures: what is drawn stays on the page."""

import pytest

pytest.importorskip("matplotlib")

from graphlora.report.plotting import legend, panels, rendered


@pytest.mark.parametrize(("label", "columns"), [("LoRA", 4), ("GraphLoRA no Poisson", 3), ("a" * 200, 1)])
def test_a_legend_has_as_many_columns_as_fit(label, columns):
    figure, (axes,) = panels(1, 1)
    handles = [axes.plot([0, 1], [0, k])[0] for k in range(9)]
    legend(figure, handles, [label] * 9)
    (drawn,) = figure.legends
    assert drawn._ncols == columns
    rendered(figure, "png")
    if columns > 1:
        box = drawn.get_window_extent()
        assert box.x0 >= 0 and box.x1 <= figure.bbox.width
