"""A worker: takes one missing run after the other until none is left. Started with its runs on standard input."""

from __future__ import annotations

import json
import os
import signal
import sys
import threading
import warnings
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from pathlib import Path
from types import FrameType

from graphlora.study.claims import Claim, claim, refreshed
from graphlora.study.plan import Run
from graphlora.study.records import StudyFolder, shared

Tell = Callable[[str], None]
INTERRUPTED = 130
# Exit code of a worker whose device can do no further work; the next worker starts afresh.
BROKEN_DEVICE = 71
# What one run can fail with while the others go on. A bug of ours, such as a TypeError, ends the worker instead.
FAILURES = (ValueError, RuntimeError, OSError, MemoryError, ArithmeticError)


def work(runs: Sequence[Run], folder: StudyFolder, tell: Tell, workers: int = 1) -> bool:
    """Do the runs that are missing, have not failed, and that no other worker has, in their order.

    Args:
        runs: Runs of the study.
        folder: Where records go.
        tell: Takes one line per run.
        workers: Processes of this study on the device, this one among them; the records say so.

    Returns:
        Whether the device still works; if not, a new process has to go on.

    Raises:
        KeyboardInterrupt: Ctrl-C or SIGTERM; the run in work goes on where its last checkpoint is.
    """
    from graphlora.study.kept import KeptWorkbench

    workbench = KeptWorkbench()
    took_one = True
    while took_one:
        took_one = False
        for run in runs:
            if folder.is_done(run) or folder.has_failed(run):
                continue
            taken = claim(folder.path, run.run_id)
            if taken is None:
                continue
            with ExitStack() as stack:
                stack.callback(taken.release)
                # Another worker may have finished it between the look and the claim.
                if folder.is_done(run) or folder.has_failed(run):
                    continue
                took_one = True
                if not _do(run, folder, taken, workbench, tell, workers):
                    return False
    return True


def _do(run: Run, folder: StudyFolder, taken: Claim, workbench: object, tell: Tell, workers: int) -> bool:
    """One run to its record, or to the record of its failure; whether the device still works."""
    from graphlora.study.execute import execute
    from graphlora.study.kept import KeptWorkbench

    assert isinstance(workbench, KeptWorkbench)
    try:
        with refreshed(taken):
            record = execute(run, workbench, folder.work(run), folder.adapter(run))
    except FAILURES as error:
        line = str(error).strip().split("\n")[0] or type(error).__name__
        folder.fail(run, line)
        tell(f"failed {run.title}: {line}")
        return "CUDA error" not in str(error)
    folder.finish(run, shared(record, workers))
    score = record.metrics.get("score")
    shown = "" if score is None else f"{run.metric} {score:.4f}, "
    tell(f"done {run.title}: {shown}{record.wall_time or 0:.0f} s")
    return True


@contextmanager
def terminable() -> Iterator[None]:
    """Work that SIGTERM ends as Ctrl-C does; outside of the main thread nothing changes."""

    def stop(number: int, frame: FrameType | None) -> None:
        # A second signal (the parent asks, and its end is noticed) must not cut off what the first one ends.
        signal.signal(signal.SIGTERM, signal.SIG_IGN)
        raise KeyboardInterrupt

    if threading.current_thread() is not threading.main_thread():
        yield
        return
    before = signal.signal(signal.SIGTERM, stop)
    try:
        yield
    finally:
        signal.signal(signal.SIGTERM, before)


def stop_with_parent() -> None:
    """End this worker when its standard input ends: the process that started it is gone."""

    def watch() -> None:
        while os.read(0, 1):
            pass
        os.kill(os.getpid(), signal.SIGTERM)

    threading.Thread(target=watch, daemon=True).start()


def main() -> int:
    """Read `{"runs": [...], "folder": ..., "workers": ...}` from the first line of standard input and work."""
    values = json.loads(sys.stdin.readline())
    stop_with_parent()
    warnings.filterwarnings("ignore", category=FutureWarning)
    runs = [Run(**options) for options in values["runs"]]

    def tell(line: str) -> None:
        sys.stdout.write(line + "\n")
        sys.stdout.flush()

    try:
        with terminable():
            works = work(runs, StudyFolder(Path(values["folder"])), tell, values["workers"])
    except KeyboardInterrupt:
        return INTERRUPTED
    return 0 if works else BROKEN_DEVICE


if __name__ == "__main__":
    sys.exit(main())
