"""Does what is missing of a study: in this process, or in several on one device or many."""

from __future__ import annotations

import json
import os
import queue
import signal
import subprocess
import sys
import threading
import time
from collections import Counter
from collections.abc import Sequence
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import IO, Any

from graphlora.errors import GraphLoraError
from graphlora.study.claims import claims_of
from graphlora.study.plan import Run
from graphlora.study.records import StudyFolder
from graphlora.study.worker import BROKEN_DEVICE, Tell, terminable, work

# A run whose process dies this often is recorded as failed, so that the others get their turn.
MOST_DEATHS = 2
STOP_SECONDS = 30
# What a worker has started may hold its standard output open.
LISTEN_SECONDS = 2.0


class StudyInterrupted(KeyboardInterrupt):
    """Ctrl-C or SIGTERM; the message says what is done."""


class Progress:
    """Lines with the number of runs done and the time left."""

    def __init__(self, runs: Sequence[Run], folder: StudyFolder, tell: Tell) -> None:
        self._runs, self._folder, self._tell = runs, folder, tell
        self._started, self._before = time.monotonic(), self.ended

    @property
    def ended(self) -> int:
        """Runs that are done or failed."""
        return sum(self._folder.is_done(run) or self._folder.has_failed(run) for run in self._runs)

    def __call__(self, line: str) -> None:
        """Tell what came of one run."""
        ended = self.ended
        here = max(1, ended - self._before)
        left = (time.monotonic() - self._started) / here * (len(self._runs) - ended)
        self._tell(f"[{ended}/{len(self._runs)}, {duration(left)} left] {line}")


def run_study(
    runs: Sequence[Run],
    folder: StudyFolder,
    *,
    workers: int = 1,
    devices: Sequence[str] | None = None,
    retry_failed: bool = False,
    tell: Tell = print,
) -> int:
    """Do the runs that have no record.

    Args:
        runs: Runs of the study.
        folder: Where records go; several hosts may share it.
        workers: Processes per device.
        devices: CUDA devices; those that are visible when left out.
        retry_failed: Do runs that failed again.
        tell: Takes one line per run.

    Returns:
        Number of runs that failed.

    Raises:
        GraphLoraError: Wrong options, a folder that cannot be written, or a GPU that fails.
        StudyInterrupted: Ctrl-C or SIGTERM.
    """
    if workers < 1:
        raise GraphLoraError(f"--workers is {workers}; give at least 1")
    prepare(runs, folder, retry_failed)
    places = [place for place in (devices or visible_devices()) for _ in range(workers)]
    progress = Progress(runs, folder, tell)
    try:
        with terminable():
            if len(places) > 1:
                Pool(runs, folder, places, progress).run()
            else:
                if places[0]:
                    os.environ["CUDA_VISIBLE_DEVICES"] = places[0]
                if not work(runs, folder, progress):
                    raise GraphLoraError(
                        "the GPU can do no more work in this process; the same command goes on"
                    )
    except KeyboardInterrupt as error:
        raise StudyInterrupted(
            f"stopped with {progress.ended} of {len(runs)} runs done; the same command goes on"
        ) from error
    return sum(folder.has_failed(run) for run in runs)


def prepare(runs: Sequence[Run], folder: StudyFolder, retry_failed: bool) -> None:
    """Make the folder, and forget failures that are to be tried again."""
    try:
        folder.path.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise GraphLoraError(
            f"cannot write {folder.path}: {error.strerror}; choose another --output"
        ) from error
    if retry_failed:
        for run in runs:
            folder.failure(run).unlink(missing_ok=True)


def visible_devices() -> list[str]:
    """CUDA devices that this process may use, by their numbers; one entry where there is none."""
    given = os.environ.get("CUDA_VISIBLE_DEVICES")
    if given is not None:
        return [part.strip() for part in given.split(",") if part.strip()] or [""]
    try:
        listed = subprocess.run(["nvidia-smi", "-L"], capture_output=True, text=True, timeout=30, check=True)
    except (OSError, subprocess.SubprocessError):
        return [""]
    return [str(number) for number, line in enumerate(listed.stdout.splitlines()) if line] or [""]


def duration(seconds: float) -> str:
    """`"45 s"`, `"12 min"` or `"3.5 h"`."""
    if seconds < 90:
        return f"{seconds:.0f} s"
    return f"{seconds / 60:.0f} min" if seconds < 5400 else f"{seconds / 3600:.1f} h"


@dataclass
class _Worker:
    place: str
    process: subprocess.Popen[str]
    log: Path
    listener: threading.Thread

    def close(self) -> None:
        """Take in the last lines of a process that has ended, and close its pipes."""
        self.listener.join(LISTEN_SECONDS)
        assert self.process.stdin is not None
        with suppress(BrokenPipeError):
            self.process.stdin.close()


class Pool:
    """Worker processes, each tied to one device; one that dies is replaced while runs are missing."""

    def __init__(self, runs: Sequence[Run], folder: StudyFolder, places: Sequence[str], tell: Tell) -> None:
        self._runs, self._folder, self._places, self._tell = runs, folder, list(places), tell
        self._deaths: Counter[str] = Counter()
        self._idle_deaths = 0
        self._workers: list[_Worker] = []
        self._lines: queue.Queue[str] = queue.Queue()

    def run(self) -> None:
        """Work until nothing is missing.

        Raises:
            GraphLoraError: Workers die, and not in their runs.
            KeyboardInterrupt: Ctrl-C or SIGTERM; all workers have ended.
        """
        try:
            # No more workers than runs: the rest of the places stay empty.
            self._places = self._places[: max(1, self._missing())]
            for place in self._places:
                self._start(place)
            while self._workers:
                self._say(0.2)
                for worker in [item for item in self._workers if item.process.poll() is not None]:
                    self._workers.remove(worker)
                    self._ended(worker)
            self._say(0)
        finally:
            self._stop()

    def _missing(self) -> int:
        return sum(not (self._folder.is_done(run) or self._folder.has_failed(run)) for run in self._runs)

    def _start(self, place: str) -> None:
        log = self._folder.path / ".work" / f"worker-{place or 'cpu'}-{time.time_ns()}.log"
        log.parent.mkdir(parents=True, exist_ok=True)
        with log.open("w", encoding="utf-8") as errors:
            process = subprocess.Popen(
                [sys.executable, "-m", "graphlora.study.worker"],
                stdin=subprocess.PIPE,
                stdout=subprocess.PIPE,
                stderr=errors,
                text=True,
                env={
                    **os.environ,
                    "CUDA_VISIBLE_DEVICES": place,
                    "PYTHONPATH": os.pathsep.join(filter(None, sys.path)),
                },
                # Ctrl-C reaches this process alone, which then ends the workers.
                start_new_session=True,
            )
        assert process.stdin is not None
        assert process.stdout is not None
        words = {
            "runs": [run.to_dict() for run in self._runs],
            "folder": str(self._folder.path.resolve()),
            "workers": self._places.count(place),
        }
        try:
            process.stdin.write(json.dumps(words) + "\n")
            process.stdin.flush()
        except BrokenPipeError:
            pass
        listener = threading.Thread(target=self._listen, args=(process.stdout,), daemon=True)
        listener.start()
        self._workers.append(_Worker(place, process, log, listener))

    def _listen(self, lines: IO[str]) -> None:
        with lines:
            for line in lines:
                self._lines.put(line.rstrip("\n"))

    def _say(self, timeout: float) -> None:
        try:
            self._tell(self._lines.get(timeout=timeout) if timeout else self._lines.get_nowait())
            while True:
                self._tell(self._lines.get_nowait())
        except queue.Empty:
            return

    def _ended(self, worker: _Worker) -> None:
        """Replace a worker that died; a run that it died in too often has failed."""
        worker.close()
        code = worker.process.returncode
        if code == 0:
            worker.log.unlink(missing_ok=True)
            return
        cause = f"its process ended with {_reason(code)}: {_last_line(worker.log)}"
        held = claims_of(self._folder.path, worker.process.pid)
        by_id = {run.run_id: run for run in self._runs}
        for run_id in held:
            self._deaths[run_id] += 1
            if run_id in by_id and self._deaths[run_id] >= MOST_DEATHS:
                self._folder.fail(by_id[run_id], cause)
                self._tell(f"failed {by_id[run_id].title}: {cause}")
        # A worker may lose its claim to another one between its end and this look at it.
        self._idle_deaths += 0 if held or code == BROKEN_DEVICE else 1
        if self._idle_deaths > MOST_DEATHS:
            raise GraphLoraError(f"workers cannot start; {cause} (whole output: {worker.log})")
        if self._missing():
            self._start(worker.place)

    def _stop(self) -> None:
        for worker in self._workers:
            worker.process.terminate()
        limit = time.monotonic() + STOP_SECONDS
        for worker in self._workers:
            try:
                worker.process.wait(max(0.1, limit - time.monotonic()))
            except subprocess.TimeoutExpired:
                worker.process.kill()
                worker.process.wait()
            worker.close()
        self._workers = []


def _reason(code: int) -> str:
    if code >= 0:
        return f"exit code {code}"
    try:
        return signal.Signals(-code).name
    except ValueError:
        return f"signal {-code}"


def _last_line(log: Path) -> str:
    try:
        lines: list[Any] = log.read_text(encoding="utf-8", errors="replace").strip().splitlines()
    except OSError:
        return "no output"
    return str(lines[-1]) if lines else "no output"
