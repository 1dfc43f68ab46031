"""`graphlora import` on the recorded checkpoint of the authors' code."""

from pathlib import Path

SOURCE = Path(__file__).parents[1] / "parity" / "data" / "model_tiny" / "graphlora"
GRAPH = "[[0, 1], [1, 2]]"


def test_an_imported_checkpoint_is_an_adapter_that_info_reads(graphlora, tmp_path):
    code, out, error = graphlora("import", SOURCE, tmp_path / "imported", "--graph", GRAPH)
    assert code == 0, error
    assert f"graphlora info {tmp_path / 'imported'}" in out
    shown = graphlora("info", tmp_path / "imported")[1]
    assert "preset released" in shown
    assert "0-1, 1-2" in shown


def test_mistakes_are_one_line(graphlora, tmp_path):
    assert graphlora("import", "/nowhere", tmp_path / "out")[0] == 2
    code, _, error = graphlora("import", SOURCE, tmp_path / "out", "--graph", "[[0, 99]]")
    assert code == 2
    assert "99" in error
