"""What a study's workers see of the devices: each has one of `--devices`, also when it replaces another worker."""

import os
import subprocess
import sys

import pytest

from graphlora.cli.main import main
from graphlora.study import runner
from graphlora.study.worker import BROKEN_DEVICE

# In place of a worker: says what it sees, and leaves the runs to others. The first on device 5 breaks its device.
WORKER = """
import os, sys
from pathlib import Path
sys.stdin.readline()
device = os.environ["CUDA_VISIBLE_DEVICES"]
print(f"device {device!r}", flush=True)
broken = Path(sys.argv[1])
if device == "5" and not broken.exists():
    broken.touch()
    sys.exit(int(sys.argv[2]))
"""


@pytest.fixture
def told(monkeypatch, tmp_path, study_file, capsys):
    """Runs a study's command with those words, and returns the lines of its workers."""
    start = subprocess.Popen

    def instead(words, **options):
        assert words == [sys.executable, "-m", "graphlora.study.worker"]
        return start([sys.executable, "-c", WORKER, str(tmp_path / "broken"), str(BROKEN_DEVICE)], **options)

    monkeypatch.setattr(runner.subprocess, "Popen", instead)

    def run(*words):
        assert main(["study", "run", str(study_file), "--output", str(tmp_path / "r"), *words]) == 0
        lines = capsys.readouterr().out.splitlines()
        return sorted(line.partition("] ")[2] for line in lines if "] device " in line)

    return run


def test_each_worker_has_one_device_and_so_has_the_one_that_replaces_it(told, monkeypatch):
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "8,9")
    assert told("--devices", "3,5") == ["device '3'", "device '5'", "device '5'"]


def test_devices_are_shared_by_workers_and_those_that_are_visible_are_taken_else(told, monkeypatch, tmp_path):
    (tmp_path / "broken").touch()
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "8,9")
    assert told("--devices", "3,5", "--workers", "2") == [*["device '3'"] * 2, *["device '5'"] * 2]
    assert told() == ["device '8'", "device '9'"]


def test_a_single_device_is_that_of_this_process(monkeypatch, study_file, tmp_path):
    seen = []
    monkeypatch.setattr(runner, "work", lambda *_: seen.append(os.environ["CUDA_VISIBLE_DEVICES"]) or True)
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "8,9")
    assert main(["study", "run", str(study_file), "--output", str(tmp_path), "--devices", "7"]) == 0
    assert seen == ["7"]
