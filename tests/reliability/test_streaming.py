"""Memory while rows pass through the data path of a training; `python -m reliability.streaming` is the full size."""

import json
import subprocess
import sys

import pytest

# A process of its own: what other tests left free in this one would hide growth, or look like it.
MEASURE = """
import json, sys
from pathlib import Path
from reliability.streaming import measure

(few := Path(sys.argv[1]) / "few").mkdir()
print(json.dumps([measure(few, rows=2_000, ranks=64), measure(Path(sys.argv[1]), rows=100_000, ranks=64)]))
"""


def test_memory_does_not_grow_with_the_data(tmp_path):
    done = subprocess.run(
        [sys.executable, "-c", MEASURE, str(tmp_path)], capture_output=True, text=True, check=True
    )
    few, values = json.loads(done.stdout.splitlines()[-1])
    assert values["rows_held_out"] == pytest.approx(1000, rel=0.2)
    assert values["rows_read"] == pytest.approx(100_000 - values["rows_held_out"], abs=64 * 64)
    assert values["rows_tokenized"] == (values["rows_read"] - values["rows_trained_on"]) // 64
    # With all rows in one block it was 48 MB, with blocks of 10,000 rows 10 MB.
    # With all rows in one block it was 48 MB, with blocks of 10,000 rows 10 MB.
    assert values["start_bytes"] + values["growth_bytes"] - few["start_bytes"] < 20e6
