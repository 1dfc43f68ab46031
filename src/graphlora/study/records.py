"""The files of a study's results: what is done, what failed, what is on the way."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass, replace
from pathlib import Path

from graphlora.errors import GraphLoraError
from graphlora.records import WORKERS, RunRecord
from graphlora.study.claims import Owner, claimed
from graphlora.study.plan import Run

FAILURE_KIND = "study-failure"
RESULTS = Path("results")


@dataclass(frozen=True)
class StudyFolder:
    """Folder of one study's records.

    Attributes:
        path: `<results>/<study>`.
    """

    path: Path

    def record(self, run: Run) -> Path:
        """File of a run's record."""
        return self.path / f"{run.run_id}.json"

    def failure(self, run: Run) -> Path:
        """File of the record of a run's failure."""
        return self.path / f"{run.run_id}.failure.json"

    def work(self, run: Run) -> Path:
        """Folder of a run's checkpoints while it is on its way."""
        return self.path / ".work" / run.run_id

    def adapter(self, run: Run) -> Path | None:
        """Folder of a run's adapter, where the study keeps adapters."""
        return self.path / "adapters" / run.run_id if run.keep_adapter else None

    def is_done(self, run: Run) -> bool:
        """Whether the run's record is there."""
        return self.record(run).is_file()

    def has_failed(self, run: Run) -> bool:
        """Whether the run failed, and has not succeeded since."""
        return self.failure(run).is_file() and not self.is_done(run)

    def finish(self, run: Run, record: RunRecord) -> None:
        """Write a run's record; a failure from before is forgotten."""
        record.write(self.record(run))
        self.failure(run).unlink(missing_ok=True)

    def fail(self, run: Run, error: str) -> None:
        """Write the record of a failure."""
        record = RunRecord.create(
            FAILURE_KIND,
            {**run.options, "model": run.model, "task": run.task, "data_dir": None},
            {"task": run.task, "metric": run.metric, "error": " ".join(error.split())},
            study=run.study,
            variant=run.variant,
            model=run.model,
            seed=run.seed,
        )
        replace(record, run_id=run.run_id).write(self.failure(run))

    def records(self, runs: Iterable[Run]) -> dict[str, RunRecord]:
        """Records of the runs that are done, by run.

        Raises:
            GraphLoraError: A broken record; names the file and the remedy.
        """
        found = {}
        for run in runs:
            if self.is_done(run):
                try:
                    found[run.run_id] = RunRecord.read(self.record(run))
                except GraphLoraError as error:
                    raise GraphLoraError(f"{error}; delete the file, and the run is done again") from error
        return found

    def failures(self, runs: Iterable[Run]) -> dict[str, str]:
        """Error lines of the runs that failed, by run."""
        failed = [run for run in runs if self.has_failed(run)]
        return {run.run_id: str(RunRecord.read(self.failure(run)).metrics["error"]) for run in failed}

    def running(self) -> dict[str, Owner | None]:
        """Runs that a living process does now."""
        return claimed(self.path)


def shared(record: RunRecord, workers: int) -> RunRecord:
    """The record with the number of worker processes that its study had on the device.

    Speed and time compare only between runs that had a device alone. What other commands ran there is not known.
    """
    return replace(record, provenance={**record.provenance, WORKERS: workers})


def study_folder(results: str | Path | None, study: str) -> StudyFolder:
    """Folder of a study under the folder of all results."""
    return StudyFolder(Path(results if results is not None else RESULTS).expanduser() / study)
