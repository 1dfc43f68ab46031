"""Memory of real runs while they load a base; `python -m reliability.loading_once` does it with 1.8 GB."""

import sys

import pytest
from reliability.loading_once import LIMIT, measure


@pytest.mark.slow
@pytest.mark.skipif(sys.platform != "linux", reason="kinds of memory are read from Linux's /proc")
def test_no_second_copy_of_the_base_is_made(tmp_path):
    found = measure(tmp_path, 1024, 8)
    for dtype, values in found.items():
        assert values["files"] > 1
        assert values["own_mb"] < LIMIT * values["base_mb"], dtype
    # Weights of another dtype are copied, so a measurement that sees nothing would fail here.
    assert found["bfloat16"]["own_mb"] > 0.8 * found["bfloat16"]["base_mb"]
