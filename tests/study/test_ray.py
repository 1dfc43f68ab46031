"""The same study on a Ray cluster of two nodes gives the same records, also when a worker is killed."""

import importlib.util
import subprocess
import sys
from pathlib import Path

import pytest

from graphlora.study.plan import make_runs
from graphlora.study.records import study_folder
from graphlora.study.runner import run_study
from graphlora.study.spec import load_spec

SCRIPT = Path(__file__).parents[1] / "support" / "ray_study.py"
SPEC = importlib.util.spec_from_file_location("kills", Path(__file__).with_name("test_kill.py"))
assert SPEC is not None
assert SPEC.loader is not None
kills = importlib.util.module_from_spec(SPEC)
SPEC.loader.exec_module(kills)


@pytest.mark.slow
@pytest.mark.skipif(
    importlib.util.find_spec("ray") is None, reason="Ray is not installed: pip install 'graphlora[ray]'"
)
def test_a_cluster_of_two_nodes_that_loses_a_worker(study_file, tmp_path):
    spec = load_spec(str(study_file))
    assert (
        run_study(make_runs(spec), study_folder(tmp_path / "here", spec.study), tell=lambda line: None) == 0
    )
    words = [sys.executable, "-W", "ignore", str(SCRIPT), str(study_file), str(tmp_path / "ray")]
    done = subprocess.run(words, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr[-2000:]
    assert "killed" in done.stdout
    here, there = kills.records(tmp_path / "here" / "tiny"), kills.records(tmp_path / "ray" / "tiny")
    assert len(here) == 5
    assert there == here
