"""A study killed at random points and started again leaves the records of an undisturbed one: real SIGKILLs."""

import json
import os
import re
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import yaml
from reliability.study_kills import compare, records

# In a process of its own, since forks of one that has computed can hang.
KILLS = """
import json
import sys
from pathlib import Path
import torch
from reliability.study_kills import summarize, tiny_study, undisturbed_and_killed
torch.set_num_threads(1)
folder = Path(sys.argv[1])
found = undisturbed_and_killed(tiny_study(folder), folder, kills=10, longest=1.5)
print(json.dumps(summarize(found)))
"""
COMMAND = [sys.executable, "-W", "ignore", "-m", "graphlora.cli", "study", "run"]


@pytest.fixture
def long_study(study_values, tmp_path) -> Path:
    """As many steps as make a run last about a second, so that kills fall into it."""
    policy = {**study_values["policy"], "max_steps": 24, "eval_steps": 4, "logging_steps": 2}
    path = tmp_path / "study.yaml"
    path.write_text(yaml.safe_dump({**study_values, "policy": policy}, sort_keys=False))
    return path


@pytest.mark.slow
def test_ten_kills_leave_the_same_records(tmp_path):
    words = [sys.executable, "-W", "ignore", "-c", KILLS, str(tmp_path)]
    done = subprocess.run(words, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr[-2000:]
    hit = json.loads(done.stdout.splitlines()[-1])
    assert len(hit["kills"]) == 10
    assert all(kill["step"] >= kill["resumed_from"] for kill in hit["kills"])
    assert sum(kill["step"] > 0 for kill in hit["kills"]) >= 8
    assert hit["records_at_kills"] == sorted(hit["records_at_kills"])
    assert hit["records_at_kills"][0] == 1 and hit["records_at_kills"][-1] == 4
    assert set(hit["killed_variants"]) == {"lora", "graphlora"}
    assert any(kill["resumed_from"] > 0 for kill in hit["kills"] if kill["variants"] == ["graphlora"])
    assert hit["resumed"] >= 3
    found = compare(records(tmp_path / "undisturbed"), records(tmp_path / "killed"))
    assert found["runs"] == 5 and found["same_runs"]
    assert found["differing"] == 0
    assert found["spread"] > 0
    for name in ("claims", ".work"):
        assert not list((tmp_path / "killed" / "kills" / name).iterdir())


def test_what_differs_is_counted():
    def record(score, loss):
        return {"variant": "lora", "metrics": {"score": score, "train_loss": loss}}

    first = {"a": record(0.5, 1.0), "b": record(0.7, 1.0)}
    second = {"a": record(0.5, 1.1), "b": record(0.6, 1.0)}
    found = compare(first, second)
    assert (found["runs"], found["same_runs"], found["differing"]) == (2, True, 2)
    assert found["largest_difference"] == pytest.approx(0.1)
    assert found["spread"] == pytest.approx(0.1414, abs=1e-4)
    assert not compare(first, {"a": second["a"]})["same_runs"]
    assert not compare({}, {})["same_runs"]


def wait_for_claim(folder: Path, process: subprocess.Popen) -> int:
    """Process id of the first claim."""
    while True:
        assert process.poll() is None, process.communicate()
        for path in folder.glob("claims/*.claim.*"):
            text = path.read_text() if path.exists() else ""
            if text.endswith("\n"):
                return json.loads(text)["pid"]
        time.sleep(0.05)


def start(study: Path, results: Path, *words: object) -> subprocess.Popen:
    return subprocess.Popen(
        [*COMMAND, str(study), "--output", str(results), *map(str, words)],
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        # A shell's background jobs, and what they start, ignore Ctrl-C otherwise.
        preexec_fn=lambda: signal.signal(signal.SIGINT, signal.SIG_DFL),
    )


@pytest.mark.slow
def test_a_worker_that_dies_is_replaced_and_ctrl_c_stops_all(long_study, tmp_path):
    folder = tmp_path / "r" / "tiny"
    process = start(long_study, tmp_path / "r", "--workers", 2)
    killed = wait_for_claim(folder, process)
    os.kill(killed, signal.SIGKILL)
    while not list(folder.glob("*.json")):
        assert process.poll() is None, process.communicate()
        time.sleep(0.05)
    process.send_signal(signal.SIGINT)
    out, error = process.communicate(timeout=60)
    assert process.returncode == 130, error
    assert "Traceback" not in error
    assert re.search(r"stopped with \d of 5 runs done; the same command goes on", error)
    # The killed one's stays until its run is taken again, which may not have happened yet.
    left = [json.loads(path.read_text())["pid"] for path in folder.glob("claims/*.claim.*")]
    assert set(left) <= {killed}, out
    process = start(long_study, tmp_path / "r", "--workers", 2)
    out, error = process.communicate(timeout=120)
    assert process.returncode == 0, error
    assert "all 5 runs are done" in out
    assert len(list(folder.glob("*.json"))) == 5
