"""Two real processes."""

import pytest
from reliability.ties import run_ranks


@pytest.mark.weekly
def test_two_processes_break_ties_alike(tmp_path):
    found = run_ranks(tmp_path)
    assert [part["wrong"] for part in found] == [[], []]
    assert found[0]["decisions"] == 2 * 12 * 24
