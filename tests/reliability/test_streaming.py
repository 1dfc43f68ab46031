"""Memory while rows pass through the data path of a training; `python -m reliability.streaming` is the full size."""

import pytest
from reliability.streaming import measure


def test_memory_does_not_grow_with_the_data(tmp_path):
    values = measure(tmp_path, rows=50_000, ranks=16)
    assert values["rows_held_out"] == pytest.approx(500, rel=0.2)
    assert values["rows_read"] == pytest.approx(50_000 - values["rows_held_out"], abs=16 * 64)
    assert values["rows_tokenized"] == (values["rows_read"] - values["rows_trained_on"]) // 16
    # Held in memory, the rows take about 60 MB as examples.
    assert values["growth_bytes"] < 25e6
