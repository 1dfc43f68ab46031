"""Small files that ask for endless memory are refused in one line, and before the memory is taken."""

from pathlib import Path

import pytest
from reliability.bombs import BOMBS, LIMIT_MB, measure

# These take seconds to make; `python -m reliability.bombs` measures them too.
LARGE = {"2 GB of zeros in a .gz", "2 GB of rows in a .gz", "2 GB of zeros in a checkpoint"}


@pytest.mark.skipif(
    not Path("/proc/self/clear_refs").exists(), reason="peak memory is read from Linux's /proc"
)
@pytest.mark.parametrize("name", [name for name in BOMBS if name not in LARGE])
def test_a_small_file_cannot_ask_for_endless_memory(name):
    found = measure([name])[name]
    assert found["message"], "it was accepted"
    assert found["message"].isprintable()
    assert found["mb"] < LIMIT_MB


@pytest.mark.slow
@pytest.mark.skipif(
    not Path("/proc/self/clear_refs").exists(), reason="peak memory is read from Linux's /proc"
)
@pytest.mark.parametrize("name", sorted(LARGE))
def test_a_compressed_file_cannot_fill_the_memory(name):
    found = measure([name])[name]
    assert found["message"], "it was accepted"
    assert found["mb"] < LIMIT_MB
