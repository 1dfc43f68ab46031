"""SIGKILL at random moments: a run that is killed again and again ends with the weights of an undisturbed one.

A round is one run into an empty folder: it is started, killed at a random moment, resumed, killed, ... and at last left
to finish. Then its weights, the state of its optimizer and the losses it logged are compared with those of a run that
nobody disturbed. A good part of the kills waits until a checkpoint or the adapter is being written.
"""

from __future__ import annotations

import argparse
import contextlib
import json
import os
import random
import signal
import subprocess
import sys
import tempfile
import time
import warnings
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path

import torch
import yaml

from graphlora.training.checkpoints import CHECKPOINTS, STAGING, last_checkpoint
from reliability.record import write_record
from reliability.tiny import differing, recipe

KILLS_PER_ROUND = 5
SHARE_IN_SAVES = 0.5
# A save of the tiny run takes about as long; the kill comes at a random moment of it.
SAVE_SECONDS = 0.02
PROMISE = (
    "A run killed with SIGKILL at any moment, also while it saves, resumes from a whole checkpoint and ends with the "
    "same weights, bit for bit, as an undisturbed one."
)


@dataclass
class Tally:
    """What happened.

    Attributes:
        kills: Processes killed.
        in_saves: Of them, while a checkpoint or the adapter was half written.
        before_checkpoint: Of them, before the first checkpoint.
        resumed: Processes that went on from a checkpoint.
        rounds: Runs that were let finish.
        differing: Tensors of finished runs that differ from the undisturbed one.
        tensors: Tensors compared.
    """

    kills: int = 0
    in_saves: int = 0
    before_checkpoint: int = 0
    resumed: int = 0
    rounds: int = 0
    differing: int = 0
    tensors: int = 0
    problems: list[str] = field(default_factory=list)


class Forked:
    """`graphlora train` in a fork of this process, which has loaded the libraries but computed nothing."""

    def __init__(self, words: list[str], log: Path) -> None:
        from graphlora.cli.main import main

        self.pid = os.fork()
        if self.pid == 0:
            out = os.open(log, os.O_WRONLY | os.O_CREAT | os.O_APPEND)
            os.dup2(out, 1)
            os.dup2(out, 2)
            code = 1
            with contextlib.suppress(BaseException):
                code = main(["train", *words])
            sys.stderr.flush()
            os._exit(code)
        self.code: int | None = None

    def poll(self) -> int | None:
        """Exit code; `None` while it runs."""
        if self.code is None:
            pid, status = os.waitpid(self.pid, os.WNOHANG)
            self.code = os.waitstatus_to_exitcode(status) if pid else None
        return self.code

    def kill(self) -> None:
        """SIGKILL."""
        os.kill(self.pid, signal.SIGKILL)
        self.code = os.waitstatus_to_exitcode(os.waitpid(self.pid, 0)[1])


class Executed:
    """`graphlora train` in a process of its own, started from nothing."""

    def __init__(self, words: list[str], log: Path) -> None:
        with log.open("a") as out:
            self._process = subprocess.Popen(
                [sys.executable, "-W", "ignore", "-m", "graphlora.cli", "train", *words],
                stdout=out,
                stderr=out,
            )

    def poll(self) -> int | None:
        """Exit code; `None` while it runs."""
        return self._process.poll()

    def kill(self) -> None:
        """SIGKILL."""
        self._process.kill()
        self._process.wait()


class Pair:
    """Two processes (gloo) under torchrun; all of them are killed."""

    def __init__(self, words: list[str], log: Path) -> None:
        launch = ["-W", "ignore", "-m", "torch.distributed.run", "--standalone", "--nproc_per_node", "2"]
        with log.open("a") as out:
            self._process = subprocess.Popen(
                [sys.executable, *launch, "-m", "graphlora.cli", "train", *words],
                stdout=out,
                stderr=out,
                start_new_session=True,
            )

    def poll(self) -> int | None:
        """Exit code; `None` while it runs."""
        return self._process.poll()

    def kill(self) -> None:
        """SIGKILL to torchrun and to what it has started, each in a session of its own."""
        family = [self._process.pid, *_children(self._process.pid)]
        for pid in family:
            with contextlib.suppress(ProcessLookupError):
                os.kill(pid, signal.SIGKILL)
        self._process.wait()


Start = Callable[[list[str], Path], "Forked | Executed | Pair"]


def run_rounds(
    folder: Path, count: int, seed: int, start: Start, tell: Callable[[str], None], **options: object
) -> Tally:
    """Kill `count` processes, in rounds.

    Args:
        folder: An empty folder.
        count: Kills.
        seed: Of the moments.
        start: How a process is started.
        tell: Called with a line for each round.
        options: Options of the run.
    """
    path = folder / "recipe.yaml"
    path.write_text(yaml.safe_dump(recipe(folder, **options, output_dir=str(folder / "undisturbed"))))
    began = time.perf_counter()
    log = folder / "log.txt"
    process = start(["--config", str(path)], log)
    while process.poll() is None:
        time.sleep(0.01)
    seconds = time.perf_counter() - began
    if process.poll() != 0:
        raise SystemExit(f"the undisturbed run failed:\n{log.read_text()[-3000:]}")
    draw, tally = random.Random(seed), Tally()
    while tally.kills < count:
        output = folder / f"round{tally.rounds}"
        _round(path, output, log, min(KILLS_PER_ROUND, count - tally.kills), seconds, draw, start, tally)
        _compare(folder / "undisturbed", output, tally)
        tally.resumed = log.read_text().count("going on from ")
        tell(
            f"round {tally.rounds}: {tally.kills} kills, {tally.in_saves} in a save, {tally.resumed} resumed, "
            f"{tally.differing} of {tally.tensors} tensors differ"
        )
    text = log.read_text()
    tally.problems += [line for line in text.splitlines() if "Traceback" in line or "is damaged" in line]
    return tally


def _round(
    path: Path,
    output: Path,
    log: Path,
    kills: int,
    seconds: float,
    draw: random.Random,
    start: Start,
    tally: Tally,
) -> None:
    words = ["--config", str(path), "--output_dir", str(output), "--resume"]
    killed = 0
    while killed < kills:
        process = start(words, log)
        if draw.random() < SHARE_IN_SAVES:
            _wait_for_save(output, process, draw)
        else:
            _wait(process, draw.uniform(0, 0.7 * seconds))
        if process.poll() is not None:
            break  # it was faster: the rest of the kills fall into another round
        process.kill()
        killed += 1
        tally.kills += 1
        tally.in_saves += any((output / part / STAGING).exists() for part in ("", CHECKPOINTS))
        tally.before_checkpoint += last_checkpoint(output) is None
    process = start(words, log)
    while process.poll() is None:
        time.sleep(0.01)
    if process.poll() != 0:
        tally.problems.append(f"{output.name} ended with exit code {process.poll()}")
    tally.rounds += 1


def _wait(process: Forked | Executed | Pair, seconds: float) -> None:
    end = time.perf_counter() + seconds
    while time.perf_counter() < end and process.poll() is None:
        time.sleep(0.005)


def _wait_for_save(output: Path, process: Forked | Executed | Pair, draw: random.Random) -> None:
    """Until one of the next saves has begun, and a random part of it is done."""
    for _ in range(draw.randint(1, 4)):
        while not (output / CHECKPOINTS / STAGING).exists() and not (output / STAGING).exists():
            if process.poll() is not None:
                return
            time.sleep(0.0002)
        moment = time.perf_counter() + draw.uniform(0, SAVE_SECONDS)
        while time.perf_counter() < moment:
            pass


def _compare(one: Path, other: Path, tally: Tally) -> None:
    name = f"{CHECKPOINTS}/checkpoint-{json.loads((one / 'record.json').read_text())['metrics']['steps']}"
    for part in ("", name):
        different, total = differing(one / part, other / part)
        tally.differing += different
        tally.tensors += total
    states = [
        [torch.load(folder / name / file, weights_only=True) for file in ("optimizer.pt", "scheduler.pt")]
        for folder in (one, other)
    ]
    curves = [
        [
            entry.get("loss")
            for entry in json.loads((f / name / "trainer_state.json").read_text())["log_history"]
        ]
        for f in (one, other)
    ]
    if not _equal(*states):
        tally.problems.append(f"{other.name}: the optimizer's state differs")
    if curves[0] != curves[1]:
        tally.problems.append(f"{other.name}: the logged losses differ")


def _equal(one: object, other: object) -> bool:
    if isinstance(one, torch.Tensor) and isinstance(other, torch.Tensor):
        return torch.equal(one, other)
    if isinstance(one, dict) and isinstance(other, dict):
        return one.keys() == other.keys() and all(_equal(one[key], other[key]) for key in one)
    if isinstance(one, (list, tuple)) and isinstance(other, (list, tuple)):
        return len(one) == len(other) and all(map(_equal, one, other))
    return one == other


def _children(pid: int) -> list[int]:
    import psutil

    return [child.pid for child in psutil.Process(pid).children(recursive=True)]


def main(count: int = 50, executed: int = 10, seed: int = 0, write: bool = True) -> Tally:
    """Run and record; raises SystemExit where the promise does not hold."""
    warnings.simplefilter("ignore")
    torch.set_num_threads(1)
    import graphlora.training.run  # noqa: F401 - loaded once, for all forks

    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        tallies = []
        for part, (start, kills) in enumerate(((Forked, count - executed), (Executed, executed))):
            if kills > 0:
                own = folder / start.__name__
                own.mkdir()
                tallies.append(run_rounds(own, kills, seed + part, start, print))
    total = _sum(tallies)
    fail_unless_held(total)
    if write:
        write_record(
            "kills",
            PROMISE,
            "tests/reliability/test_kills.py::test_killed_runs_end_with_the_weights_of_an_undisturbed_one",
            figure(total),
            record_values(total)
            | {"started_from_nothing": executed, "forked": count - executed, "seed": seed},
        )
    print(figure(total))
    return total


def figure(tally: Tally) -> str:
    """The figure of the table."""
    return (
        f"{tally.kills} kills ({tally.in_saves} during a save), all resumed, {tally.rounds} runs finished, "
        f"{tally.differing} of {tally.tensors} tensors differ"
    )


def record_values(tally: Tally) -> dict[str, object]:
    """The numbers of a tally, for the record."""
    return {name: value for name, value in vars(tally).items() if name != "problems"}


def _sum(tallies: list[Tally]) -> Tally:
    total = Tally()
    for tally in tallies:
        for name, value in vars(tally).items():
            setattr(total, name, getattr(total, name) + value)
    return total


def fail_unless_held(tally: Tally) -> None:
    """Raise SystemExit where the promise does not hold."""
    if tally.differing or tally.problems:
        raise SystemExit(f"the promise does not hold: {tally}")


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(prog="python -m reliability.kills", description=__doc__)
    parser.add_argument("--count", type=int, default=50, help="kills (default: 50)")
    parser.add_argument(
        "--executed",
        type=int,
        default=10,
        help="of them, of processes that are started from nothing (default: 10)",
    )
    parser.add_argument("--seed", type=int, default=0, help="seed of the moments (default: 0)")
    parser.add_argument("--no-record", action="store_true", help="write no record")
    return parser


if __name__ == "__main__":
    options = _parser().parse_args()
    main(options.count, min(options.executed, options.count), options.seed, not options.no_record)
