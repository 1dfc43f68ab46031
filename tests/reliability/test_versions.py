"""The record of versions comes from the last lines of the tests, and a run that stopped early is none."""

import pytest
from reliability.versions import read_summary

from graphlora.errors import GraphLoraError

HEAD = "WARNING: noise\ncompat: python 3.11.7 torch 2.10.0\n...\n"


@pytest.mark.parametrize(
    ("end", "passed", "failed"),
    [
        ("730 passed, 12 skipped in 90.12s (0:01:30)", 730, 0),
        ("2 failed, 728 passed, 1 error in 9.1s", 728, 3),
        ("1 passed in 1.00s", 1, 0),
    ],
)
def test_a_summary_is_read(end, passed, failed):
    assert read_summary(HEAD + end) == {
        "versions": "python 3.11.7 torch 2.10.0",
        "passed": passed,
        "failed": failed,
    }


@pytest.mark.parametrize("text", ["", HEAD, "730 passed in 90.12s", HEAD + "usage: scripts/compat.sh"])
def test_a_run_that_stopped_early_is_no_result(text):
    with pytest.raises(GraphLoraError, match="did not finish"):
        read_summary(text)
