"""A study whose process is killed again and again, in forks of a process that has the packages loaded.

Arguments: study file, results folder, number of kills, seed. Prints how many runs were done at each kill.
"""

import os
import random
import signal
import sys
import time
from pathlib import Path

import torch

import graphlora.study.execute  # noqa: F401 - loaded once, for all forks
from graphlora.study.plan import make_runs
from graphlora.study.records import study_folder
from graphlora.study.runner import run_study
from graphlora.study.spec import load_spec

torch.set_num_threads(1)


def fork(study: str, results: str) -> int:
    """A process that does the study."""
    child = os.fork()
    if child == 0:
        spec = load_spec(study)
        failed = run_study(make_runs(spec), study_folder(results, spec.study), tell=lambda line: None)
        os._exit(1 if failed else 0)
    return child


def main() -> int:
    study, results, kills, seed = sys.argv[1], sys.argv[2], int(sys.argv[3]), int(sys.argv[4])
    draw = random.Random(seed)
    folder = Path(results) / load_spec(study).study
    for _ in range(kills):
        child = fork(study, results)
        time.sleep(draw.uniform(0.1, 2.0))
        alive = os.waitpid(child, os.WNOHANG) == (0, 0)
        if not alive:
            break
        os.kill(child, signal.SIGKILL)
        os.waitpid(child, 0)
        done = len(list(folder.glob("*.json")))
        sys.stdout.write(f"killed {done}\n")
        sys.stdout.flush()
    status = os.waitpid(fork(study, results), 0)[1]
    return os.waitstatus_to_exitcode(status)


if __name__ == "__main__":
    sys.exit(main())
