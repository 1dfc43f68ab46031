"""A study on a Ray cluster of two nodes that loses a worker within a run: the records are those of one without Ray.

It needs Ray: `pip install 'graphlora[ray]'`. Both nodes are on this machine, each with one CPU and a place of its own
for temporary files, where the checkpoints of runs show what it does.
"""

from __future__ import annotations

import argparse
import importlib.util
import os
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import psutil

from graphlora.study.plan import make_runs
from graphlora.study.spec import load_spec
from graphlora.training.checkpoints import CHECKPOINTS, SEAL_FILE
from reliability.record import RESULTS, write_record
from reliability.study_kills import compare, records, tiny_study

PROMISE = (
    "A study on a Ray cluster of two nodes, one of which loses its worker within a run, ends with the records of a "
    "study without Ray, equal in everything but time, memory and host."
)
TEST = "`tests/study/test_ray.py::test_a_cluster_of_two_nodes_that_loses_a_worker`, weekly"
COMMAND = [sys.executable, "-W", "ignore", "-m", "graphlora.cli", "study", "run"]
NODES = ("first", "second")
POLL_SECONDS = 0.02
# What Ray gives its workers, and no reports about its use.
ENVIRONMENT = {"OMP_NUM_THREADS": "1", "RAY_USAGE_STATS_ENABLED": "0"}


@dataclass
class Seen:
    """What the nodes did.

    Attributes:
        runs: Trained runs that each node worked at; in the end, those that it finished.
        killed: Node, variant and whole checkpoints of the run whose worker was killed; `None` before that.
    """

    runs: dict[str, set[str]] = field(default_factory=lambda: {name: set() for name in NODES})
    killed: dict[str, Any] | None = None


def main() -> int:
    """Runs the study without and with Ray, and writes the record."""
    parser = argparse.ArgumentParser(prog="python -m reliability.study_ray", description=__doc__)
    parser.add_argument("--out", type=Path, default=RESULTS, help="folder of the record")
    options = parser.parse_args()
    if importlib.util.find_spec("ray") is None:
        sys.stderr.write("reliability: error: Ray is not installed; pip install 'graphlora[ray]'\n")
        return 2
    os.environ.update(ENVIRONMENT)
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        study = tiny_study(folder)
        subprocess.run([*COMMAND, str(study), "--output", str(folder / "local")], check=True)
        seen, code = on_cluster(study, folder)
        values: dict[str, Any] = compare(records(folder / "local"), records(folder / "ray"))
    values |= {
        "exit_code": code,
        "runs_by_node": [len(runs) for runs in seen.runs.values()],
        "killed": seen.killed,
    }
    figure = (
        f"{values['runs']} runs, {'the same' if values['same_runs'] else 'OTHER'} ones; {values['differing']} records "
        f"differ; runs that each node trained: {', '.join(map(str, values['runs_by_node']))}; killed: {_killed(seen)}"
    )
    print(figure)
    print(write_record("study_ray", PROMISE, TEST, figure, values, folder=options.out))
    whole = code == 0 and values["same_runs"] and not values["differing"]
    return 0 if whole and seen.killed and all(seen.runs.values()) else 1


def on_cluster(study: Path, folder: Path) -> tuple[Seen, int]:
    """The study by `graphlora study run --engine ray`, with results in `folder/ray`.

    The worker of the first GraphLoRA run that has a whole checkpoint is killed.

    Returns:
        What the nodes did, and the exit code of the command.
    """
    variants = {run.run_id: run.variant for run in make_runs(load_spec(str(study)))}
    seen = Seen()
    with _cluster(folder) as address:
        words = [str(study), "--engine", "ray", "--ray_address", address, "--output", str(folder / "ray")]
        with subprocess.Popen([*COMMAND, *words]) as process:
            while process.poll() is None:
                _look(folder, variants, seen)
                time.sleep(POLL_SECONDS)
    for node in NODES:
        # The folder of a run that was lost, and repeated by the other node, stays.
        seen.runs[node] -= {work.name for work in _at_work(folder, node)}
    return seen, process.returncode


@contextmanager
def _cluster(folder: Path) -> Iterator[str]:
    """Address of a cluster of two nodes, whose temporary files are in `folder/NODE`."""
    from ray.cluster_utils import Cluster  # pyright: ignore[reportMissingImports] - an optional extra

    for name in NODES:
        (folder / name).mkdir()
    first, second = ({"num_cpus": 1, "env_vars": {"TMPDIR": str(folder / name)}} for name in NODES)
    cluster = Cluster(initialize_head=True, head_node_args={**first, "include_dashboard": False})
    try:
        cluster.add_node(**second)
        yield cluster.address
    finally:
        cluster.shutdown()


def _look(folder: Path, variants: dict[str, str], seen: Seen) -> None:
    """Note which node works at which run, and kill a worker, once."""
    for node in NODES:
        for work in _at_work(folder, node):
            seen.runs[node].add(work.name)
            whole = sorted(path.parent.name for path in work.glob(f"{CHECKPOINTS}/checkpoint-*/{SEAL_FILE}"))
            if seen.killed is None and whole and variants[work.name] == "graphlora":
                _kill_worker(folder / node)
                seen.killed = {"node": node, "variant": variants[work.name], "checkpoints": whole}


def _at_work(folder: Path, node: str) -> list[Path]:
    """Folders of the runs that a node has begun and not finished."""
    return list((folder / node / "graphlora-study").glob("*"))


def _kill_worker(temporary: Path) -> None:
    """SIGKILL to the process of the node with that folder for temporary files that is at a run."""
    for process in psutil.process_iter(["cmdline", "environ"]):
        name, place = (process.info["cmdline"] or [""])[0], (process.info["environ"] or {}).get("TMPDIR")
        if name.startswith("ray::execute_run") and place == str(temporary):
            process.kill()
            return
    raise RuntimeError(f"no worker with TMPDIR={temporary} is at a run")


def _killed(seen: Seen) -> str:
    if seen.killed is None:
        return "NOTHING"
    return f"the worker at a run of {seen.killed['variant']} that had {', '.join(seen.killed['checkpoints'])}"


if __name__ == "__main__":
    sys.exit(main())
