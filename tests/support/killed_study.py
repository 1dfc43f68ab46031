"""A study done undisturbed and once more with its process killed again and again, in forks of one process.

Arguments: study file, folder (gets `undisturbed` and `killed`), number of kills, seed. Prints the records at each kill.
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


def fork(study: str, results: Path) -> int:
    """A process that does the study."""
    child = os.fork()
    if child == 0:
        spec = load_spec(study)
        failed = run_study(make_runs(spec), study_folder(results, spec.study), tell=lambda line: None)
        os._exit(1 if failed else 0)
    return child


def main() -> int:
    study, results, kills, seed = sys.argv[1], Path(sys.argv[2]), int(sys.argv[3]), int(sys.argv[4])
    status = os.waitpid(fork(study, results / "undisturbed"), 0)[1]
    draw = random.Random(seed)
    folder = results / "killed" / load_spec(study).study
    for _ in range(kills):
        child = fork(study, results / "killed")
        time.sleep(draw.uniform(0.1, 1.5))
        os.kill(child, signal.SIGKILL)
        os.waitpid(child, 0)
        sys.stdout.write(f"killed with {len(list(folder.glob('*.json')))} records\n")
    return os.waitstatus_to_exitcode(status) or os.waitstatus_to_exitcode(
        os.waitpid(fork(study, results / "killed"), 0)[1]
    )


if __name__ == "__main__":
    sys.exit(main())
