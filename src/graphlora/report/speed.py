"""Whether the speeds of a study's runs compare: those of runs that shared a device do not."""

from __future__ import annotations

from collections.abc import Sequence

from graphlora.records import WORKERS
from graphlora.report.aggregate import ModelScores
from graphlora.report.inference import summarize
from graphlora.report.reading import BASE, Run

SPEED = "tokens_per_second"
# Largest standard deviation over seeds of one method's speed on one task, as a share of its mean.
STEADY = 0.2
END = (
    "so speeds must not be compared and are left out; docs/performance.md of the project has those of methods that "
    "had a GPU alone."
)


def speed_problem(scores: ModelScores) -> str | None:
    """Why the speeds of a model's runs must not be compared, as a sentence; `None` where they may be.

    Runs that share a device have as much of it as the others leave them. Where records do not say how many shared it,
    the speed of one method on one task tells: it differs little between seeds that had equal shares.

    Args:
        scores: Scores of one model, with the runs behind them.
    """
    groups = [
        timed
        for (variant, _), runs in scores.runs.items()
        if variant != BASE and (timed := [run for run in runs if run.record.metrics.get(SPEED)])
    ]
    if not groups:
        return None
    records = [run.record for group in groups for run in group]
    workers = [record.provenance.get(WORKERS) for record in records]
    spread = max(map(_spread, groups))
    reasons = []
    if len({record.device for record in records}) > 1:
        reasons.append("runs used different devices")
    if (most := max(int(count or 1) for count in workers)) > 1:
        reasons.append(f"up to {most} runs shared a device")
    if spread > STEADY:
        if None in workers:
            reasons.append("the records do not say how many runs shared a device")
        reasons.append(
            f"the speed of one method on one task varied over seeds by up to {100 * spread:.0f}% (standard deviation "
            "over mean)"
        )
    if not reasons:
        return None
    text = " and ".join(reasons)
    return f"{text[0].upper()}{text[1:]}, {END}"


def _spread(runs: Sequence[Run]) -> float:
    """Standard deviation of the speed of runs over its mean; 0 for one run."""
    found = summarize([float(run.record.metrics[SPEED]) for run in runs])
    return (found.std or 0.0) / found.mean
