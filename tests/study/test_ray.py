"""`graphlora study run --engine ray` on a cluster of two nodes gives the records of a study without Ray."""

import importlib.util
import json
import subprocess
import sys

import pytest


@pytest.mark.weekly
@pytest.mark.skipif(
    importlib.util.find_spec("ray") is None, reason="Ray is not installed: pip install 'graphlora[ray]'"
)
def test_a_cluster_of_two_nodes_that_loses_a_worker(tmp_path):
    """In a process of its own, since Ray warns, and leaves threads behind."""
    words = [sys.executable, "-W", "ignore", "-m", "reliability.study_ray", "--out", str(tmp_path)]
    done = subprocess.run(words, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout[-2000:] + done.stderr[-2000:]
    found = json.loads((tmp_path / "study_ray.json").read_text())["values"]
    assert found["runs"] == 5 and found["same_runs"]
    assert found["differing"] == 0
    assert found["spread"] > 0
    assert found["killed"]["variant"] == "graphlora" and found["killed"]["checkpoints"]
    assert found["runs_by_node"] and all(found["runs_by_node"])
    assert sum(found["runs_by_node"]) == 4
