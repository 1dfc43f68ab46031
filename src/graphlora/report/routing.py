"""Routing health of each method: balance, entropy, dead experts, ties and overlap, by layer and in total."""

from __future__ import annotations

import math
import re
from collections import defaultdict
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from graphlora.report.aggregate import ModelScores
from graphlora.report.inference import mean
from graphlora.report.reading import Run


@dataclass(frozen=True)
class RoutingHealth:
    """One variant on one task; values are means over seeds.

    Attributes:
        task: Task.
        variant: Variant.
        n: Number of runs that recorded routing.
        layers: Numbers of the layers, ascending.
        cv: Coefficient of variation of expert load by layer [layers]; the worst block where a layer has several.
        entropy: Entropy of the routing by layer [layers], 0 to 1; the mean over the blocks of a layer.
        worst_cv: Largest coefficient of variation of any layer and seed.
        mean_cv: Mean over layers.
        mean_entropy: Mean over layers.
        dead: Dead experts per run, all layers together.
        tie_percent: Tokens in percent whose choice of experts hangs on rounding.
        overlap: Mean absolute cosine between the experts' updates.
        dead_by_run: `dead` of each run.
        ties_by_run: `tie_percent` of each run.
        overlap_by_run: `overlap` of each run.
    """

    task: str
    variant: str
    n: int
    layers: tuple[int, ...]
    cv: tuple[float | None, ...]
    entropy: tuple[float | None, ...]
    worst_cv: float | None
    mean_cv: float | None
    mean_entropy: float | None
    dead: float | None
    tie_percent: float | None
    overlap: float | None
    dead_by_run: tuple[float, ...]
    ties_by_run: tuple[float, ...]
    overlap_by_run: tuple[float, ...]


def routing_health(scores: ModelScores) -> list[RoutingHealth]:
    """Health of each variant with experts, task by task in the order of the tables."""
    found = []
    for task in scores.tasks:
        for variant in scores.trained:
            runs = [run for run in scores.runs.get((variant, task), ()) if _routing(run)]
            if runs:
                found.append(_health(task, variant, runs))
    return found


def load_cv(block: Mapping[str, Any]) -> float | None:
    """Coefficient of variation of a block's expert loads: as recorded, else from the loads."""
    if block.get("load_cv") is not None:
        return float(block["load_cv"])
    loads = [float(load) for load in block.get("expert_load") or []]
    center = mean(loads) if loads else 0.0
    if center <= 0:
        return None
    return math.sqrt(mean([(load - center) ** 2 for load in loads])) / center


def _routing(run: Run) -> dict[str, dict[str, Any]]:
    return run.record.metrics.get("routing") or {}


def _health(task: str, variant: str, runs: Sequence[Run]) -> RoutingHealth:
    cvs: dict[int, list[float]] = defaultdict(list)
    entropies: dict[int, list[float]] = defaultdict(list)
    for run in runs:
        for layer, blocks in _by_layer(_routing(run)).items():
            if found := [cv for block in blocks if (cv := load_cv(block)) is not None]:
                cvs[layer].append(max(found))
            entropies[layer] += _values(blocks, "entropy")
    layers = tuple(sorted({*cvs, *entropies}))
    cv = tuple(_mean(cvs[layer]) for layer in layers)
    entropy = tuple(_mean(entropies[layer]) for layer in layers)
    dead, ties, overlap = (
        tuple(
            scale * combine(values) for run in runs if (values := _values(list(_routing(run).values()), name))
        )
        for name, scale, combine in (
            ("dead_experts", 1, math.fsum),
            ("tie_rate", 100, mean),
            ("expert_overlap", 1, mean),
        )
    )
    return RoutingHealth(
        task=task,
        variant=variant,
        n=len(runs),
        layers=layers,
        cv=cv,
        entropy=entropy,
        worst_cv=max((value for values in cvs.values() for value in values), default=None),
        mean_cv=_mean([value for value in cv if value is not None]),
        mean_entropy=_mean([value for value in entropy if value is not None]),
        dead=_mean(dead),
        tie_percent=_mean(ties),
        overlap=_mean(overlap),
        dead_by_run=dead,
        ties_by_run=ties,
        overlap_by_run=overlap,
    )


def _by_layer(routing: Mapping[str, dict[str, Any]]) -> dict[int, list[dict[str, Any]]]:
    """Blocks by the first number in their name; blocks without one by their place."""
    layers: dict[int, list[dict[str, Any]]] = defaultdict(list)
    for place, (name, block) in enumerate(routing.items()):
        number = re.search(r"(?:^|\.)(\d+)(?:\.|$)", name)
        layers[int(number.group(1)) if number else place].append(block)
    return layers


def _values(blocks: Sequence[Mapping[str, Any]], name: str) -> list[float]:
    return [float(value) for block in blocks if (value := block.get(name)) is not None]


def _mean(values: Sequence[float]) -> float | None:
    return mean(values) if values else None
