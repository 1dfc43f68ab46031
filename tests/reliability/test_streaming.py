"""Memory while rows pass through the data path of a training; `python -m reliability.streaming` is the full size."""

import pytest
from reliability.streaming import measure


def test_memory_does_not_grow_with_the_data(tmp_path):
    (tmp_path / "few").mkdir()
    few = measure(tmp_path / "few", rows=2_000, ranks=64)
    values = measure(tmp_path, rows=100_000, ranks=64)
    assert values["rows_held_out"] == pytest.approx(1000, rel=0.2)
    assert values["rows_read"] == pytest.approx(100_000 - values["rows_held_out"], abs=64 * 64)
    assert values["rows_tokenized"] == (values["rows_read"] - values["rows_trained_on"]) // 64
    # With all rows in one block it was 48 MB, with blocks of 10,000 rows 10 MB.
    # 10 to 21 MB here, by what the allocator keeps; 48 MB where all rows are one block.
    assert values["start_bytes"] + values["growth_bytes"] - few["start_bytes"] < 34e6
