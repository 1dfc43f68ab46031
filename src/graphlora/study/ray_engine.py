"""The same study on a Ray cluster: Ray places the runs and repeats those whose process or node is lost."""

from __future__ import annotations

import shutil
import tempfile
from collections.abc import Sequence
from contextlib import ExitStack
from pathlib import Path
from typing import Any

from graphlora.errors import GraphLoraError
from graphlora.records import RunRecord
from graphlora.study.claims import claim, refreshed
from graphlora.study.plan import Run
from graphlora.study.records import StudyFolder, shared
from graphlora.study.runner import Progress, StudyInterrupted, prepare
from graphlora.study.worker import FAILURES, Tell

MOST_RETRIES = 3
# Of this process, for as long as Ray uses it again.
_workbench: Any = None


def run_on_ray(
    runs: Sequence[Run],
    folder: StudyFolder,
    *,
    workers: int = 1,
    address: str | None = None,
    retry_failed: bool = False,
    tell: Tell = print,
) -> int:
    """Do the runs that have no record on a Ray cluster; this process alone writes records.

    The nodes need the package, the models and the data, but not the results folder, unless the study keeps adapters.

    Args:
        runs: Runs of the study.
        folder: Where records go.
        workers: Runs at a time per GPU; on a cluster without GPUs, per node.
        address: The cluster, `"auto"` for the one this machine belongs to; a cluster of this machine when left out.
        retry_failed: Do runs that failed again.
        tell: Takes one line per run.

    Returns:
        Number of runs that failed.

    Raises:
        GraphLoraError: Ray is not installed, or the cluster is not there.
        StudyInterrupted: Ctrl-C.
    """
    try:
        import ray  # pyright: ignore[reportMissingImports] - an optional extra
    except ImportError as error:
        raise GraphLoraError("--engine ray needs Ray; pip install 'graphlora[ray]'") from error
    prepare(runs, folder, retry_failed)
    if not ray.is_initialized():
        try:
            ray.init(address=address, log_to_driver=False)
        except ConnectionError as error:
            raise GraphLoraError(
                f"no Ray cluster at {address!r}; start one, or leave --ray-address out"
            ) from error
    progress = Progress(runs, folder, tell)
    try:
        _Submission(ray, runs, folder, workers, progress).run()
    except KeyboardInterrupt as error:
        raise StudyInterrupted(
            f"stopped with {progress.ended} of {len(runs)} runs done; the same command goes on"
        ) from error
    return sum(folder.has_failed(run) for run in runs)


class _Submission:
    """The runs in flight: as many as the cluster has room for."""

    def __init__(
        self, ray: Any, runs: Sequence[Run], folder: StudyFolder, workers: int, tell: Progress
    ) -> None:
        self._ray, self._folder, self._tell, self._workers = ray, folder, tell, workers
        gpus = int(ray.cluster_resources().get("GPU", 0))
        nodes = sum(node["Alive"] for node in ray.nodes())
        self._slots = workers * (gpus or nodes)
        needs: dict[str, Any] = {"num_gpus": 1 / workers} if gpus else {"num_cpus": 1}
        self._remote = ray.remote(max_retries=MOST_RETRIES, scheduling_strategy="SPREAD", **needs)(
            execute_run
        )
        self._waiting = [run for run in runs if not (folder.is_done(run) or folder.has_failed(run))]
        self._flying: dict[Any, tuple[Run, ExitStack]] = {}

    def run(self) -> None:
        """Submit, take in, until nothing is left."""
        try:
            while self._waiting or self._flying:
                while self._waiting and len(self._flying) < self._slots:
                    self._submit(self._waiting.pop(0))
                if self._flying:
                    ready, _ = self._ray.wait(list(self._flying), num_returns=1, timeout=1.0)
                    for ref in ready:
                        self._take(ref)
        finally:
            for ref, (_, stack) in self._flying.items():
                self._ray.cancel(ref, force=True)
                stack.close()

    def _submit(self, run: Run) -> None:
        taken = claim(self._folder.path, run.run_id)
        if taken is None:
            return
        stack = ExitStack()
        stack.callback(taken.release)
        stack.enter_context(refreshed(taken))
        adapter = self._folder.adapter(run)
        ref = self._remote.remote(run.to_dict(), None if adapter is None else str(adapter.resolve()))
        self._flying[ref] = (run, stack)

    def _take(self, ref: Any) -> None:
        run, stack = self._flying.pop(ref)
        with stack:
            try:
                text, error = self._ray.get(ref)
            except self._ray.exceptions.RayError as lost:
                text, error = None, f"lost by Ray: {str(lost).strip().splitlines()[0]}"
            if text is None:
                self._folder.fail(run, error)
                self._tell(f"failed {run.title}: {error}")
                return
            record = RunRecord.from_json(text)
            self._folder.finish(run, shared(record, self._workers))
            score = record.metrics.get("score")
            self._tell(f"done {run.title}{'' if score is None else f': {run.metric} {score:.4f}'}")


def execute_run(values: dict[str, Any], adapter: str | None) -> tuple[str | None, str]:
    """One run on a node: the record as JSON, or `None` and why it failed."""
    global _workbench
    from graphlora.study.execute import execute
    from graphlora.study.kept import KeptWorkbench

    if _workbench is None:
        _workbench = KeptWorkbench()
    run = Run(**values)
    work = Path(tempfile.gettempdir()) / "graphlora-study" / run.run_id
    try:
        record = execute(run, _workbench, work, None if adapter is None else Path(adapter))
    except FAILURES as error:
        shutil.rmtree(work, ignore_errors=True)
        return None, str(error).strip().split("\n")[0] or type(error).__name__
    return record.to_json(), ""
