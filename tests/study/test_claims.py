"""One process per run: claims hold while their process lives, and no longer."""

import json
import os
import subprocess
import sys
import time

from graphlora.study import claims
from graphlora.study.claims import Owner, claim, claimed, claims_of, refreshed

HOLD = "import sys; from graphlora.study.claims import claim; from pathlib import Path\n"
HOLD += "print(claim(Path(sys.argv[1]), 'run') is not None, flush=True); sys.stdin.read()"


def test_a_claim_names_its_process_and_excludes_others(tmp_path):
    first = claim(tmp_path, "run")
    assert first is not None
    values = json.loads(first.path.read_text())
    assert values["pid"] == os.getpid()
    assert abs(values["time"] - time.time()) < 60
    assert claim(tmp_path, "run") is None
    assert claim(tmp_path, "other") is not None
    assert set(claimed(tmp_path)) == {"run", "other"}
    first.release()
    assert claim(tmp_path, "run") is not None


def test_the_claim_of_a_killed_process_is_taken_over(tmp_path):
    process = subprocess.Popen(
        [sys.executable, "-c", HOLD, str(tmp_path)], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True
    )
    assert process.stdout is not None
    assert process.stdout.readline() == "True\n"
    assert claim(tmp_path, "run") is None
    assert claims_of(tmp_path, process.pid) == ["run"]
    process.kill()
    process.communicate()
    assert claimed(tmp_path) == {}
    taken = claim(tmp_path, "run")
    assert taken is not None
    assert taken.path.name == "run.claim.2"
    taken.release()
    assert list((tmp_path / "claims").iterdir()) == []


def test_a_process_id_that_is_used_again_holds_nothing(tmp_path):
    first = claim(tmp_path, "run")
    assert first is not None
    values = json.loads(first.path.read_text())
    first.path.write_text(json.dumps({**values, "started": values["started"] - 100}))
    assert claim(tmp_path, "run") is not None


def test_another_hosts_claim_lasts_while_it_is_refreshed(tmp_path, monkeypatch):
    first = claim(tmp_path, "run")
    assert first is not None
    values = json.loads(first.path.read_text())
    first.path.write_text(json.dumps({**values, "host": "elsewhere"}))
    assert claim(tmp_path, "run") is None
    old = time.time() - claims.EXPIRE_SECONDS - 5
    os.utime(first.path, (old, old))
    monkeypatch.setattr(claims, "REFRESH_SECONDS", 0.05)
    with refreshed(first):
        time.sleep(0.5)
        assert claim(tmp_path, "run") is None
    os.utime(first.path, (old, old))
    assert claim(tmp_path, "run") is not None


def test_a_claim_half_written_counts_as_one(tmp_path):
    (tmp_path / "claims").mkdir()
    (tmp_path / "claims" / "run.claim.1").write_text("")
    assert claim(tmp_path, "run") is None


def test_an_owner_that_lives_is_not_gone():
    assert Owner.me().is_gone() is False
    assert Owner("elsewhere", 1, 0.0).is_gone() is None


RACE = """
import sys, time
from pathlib import Path
from graphlora.study.claims import claim
print("ready", flush=True)
sys.stdin.readline()
print(sum(claim(Path(sys.argv[1]), f"run{number}") is not None for number in range(50)), flush=True)
sys.stdin.read()
"""


def test_of_many_processes_one_gets_each_run(tmp_path):
    pipes = {"stdin": subprocess.PIPE, "stdout": subprocess.PIPE, "text": True}
    processes = [subprocess.Popen([sys.executable, "-c", RACE, str(tmp_path)], **pipes) for _ in range(3)]
    for process in processes:
        assert process.stdout.readline() == "ready\n"
    for process in processes:
        process.stdin.write("go\n")
        process.stdin.flush()
    assert sum(int(process.stdout.readline()) for process in processes) == 50
    for process in processes:
        process.communicate()
