"""Real SIGKILLs; `python -m reliability.kills` has the full number."""

import subprocess
import sys

import pytest
from reliability.record import ROOT


@pytest.mark.slow
def test_killed_runs_end_with_the_weights_of_an_undisturbed_one():
    words = ["-m", "reliability.kills", "--count", "5", "--executed", "0", "--no-record"]
    done = subprocess.run([sys.executable, "-W", "ignore", *words], cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr[-3000:]
    last = done.stdout.splitlines()[-1]
    assert last.startswith("5 kills ")
    assert " 0 of " in last
