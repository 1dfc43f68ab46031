"""The pictures show the numbers they are given, and need no torch."""

import subprocess
import sys

import numpy as np
import pytest
from matplotlib import pyplot

from graphlora.errors import GraphLoraError
from graphlora.report.figures import (
    block_labels,
    expert_flow,
    expert_flow_figure,
    expert_load_figure,
    save_figure,
)


@pytest.fixture(autouse=True)
def _close():
    yield
    pyplot.close("all")


def test_load_map_is_in_units_of_the_fair_share():
    figure = expert_load_figure({"model.layers.0.mlp": [3, 1], "model.layers.10.mlp": [1, 1, 2]})
    table = figure.axes[0].images[0].get_array().filled(-1)
    np.testing.assert_allclose(table[0], [1.5, 0.5, -1])
    np.testing.assert_allclose(table[1], [0.75, 0.75, 1.5])
    assert [label.get_text() for label in figure.axes[0].get_yticklabels()] == ["0", "10"]


def test_blocks_without_distinct_numbers_keep_their_names():
    assert block_labels(["encoder.0.mlp", "decoder.0.mlp"]) == ["encoder.0.mlp", "decoder.0.mlp"]


def test_flow_follows_each_token_with_its_weights():
    here, there = [[0, 1], [0, 2]], [[2, 1], [1, 0]]
    flow = expert_flow(here, [[0.75, 0.25], [1.0, 0.0]], there, [[1.0, 0.0], [0.5, 0.5]], num_experts=3)
    np.testing.assert_allclose(flow[0], [0.5 / 1.75, 0.5 / 1.75, 0.75 / 1.75])
    np.testing.assert_allclose(flow[1], [0, 0, 1])
    np.testing.assert_allclose(flow[2], [0, 0, 0])


def test_flow_picture_draws_edges_and_arrows_above_an_even_spread(tmp_path):
    adjacency = [[0, 1, 0], [1, 0, 0], [0, 0, 0]]
    flow = [[0.0, 0.9, 0.1], [1 / 3, 1 / 3, 1 / 3], [0.0, 0.0, 1.0]]
    figure = expert_flow_figure(adjacency, [1, 1, 2], flow)
    axes = figure.axes[0]
    assert len(axes.lines) == 1
    arrows = [text for text in axes.texts if getattr(text, "arrow_patch", None) is not None]
    assert len(arrows) == 1
    assert "next FFN block" in figure.texts[0].get_text()
    path = save_figure(figure, tmp_path / "deep" / "flow.png")
    assert path.stat().st_size > 1000


def test_mistakes_are_named(tmp_path):
    with pytest.raises(GraphLoraError, match="no expert loads"):
        expert_load_figure({})
    with pytest.raises(GraphLoraError, match="block has no expert load"):
        expert_load_figure({"block": [0, 0]})
    with pytest.raises(GraphLoraError, match=r"the graph is \(2, 2\)"):
        expert_flow_figure(np.zeros((2, 2)), [1, 1, 1], np.zeros((3, 3)))
    (tmp_path / "file").write_text("")
    with pytest.raises(GraphLoraError, match="cannot write"):
        save_figure(expert_load_figure({"a": [1, 2]}), tmp_path / "file" / "x.png")


def test_importing_reports_needs_neither_torch_nor_matplotlib():
    code = "import sys, graphlora.report.figures; assert not {'torch', 'matplotlib'} & set(sys.modules)"
    subprocess.run([sys.executable, "-c", code], check=True)
