"""Which variants of a study change one setting of the reference: the panels of the sensitivity picture."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from graphlora.report.aggregate import ModelScores, variant_runs
from graphlora.report.names import natural
from graphlora.report.reading import Run

FIELDS = {
    "num_experts": "experts N",
    "top_k": "selected experts K",
    "r": "rank r",
    "edge_density": "edge density",
    "graph_seed": "seed of the edges",
    "edge_init": "edges",
}
# What may change along with a field: alpha follows the rank in order to hold the scaling.
COMPANIONS = {"r": {"lora_alpha"}}
EDGES = {"edge_init", "edge_density", "graph_seed", "edges"}
# What differs between any two runs, or holds the adapter's options once more.
IGNORED = {"seed", "output_dir", "run_name", "variant", "task", "tasks", "policy", "adapter", "adapter_args"}
NESTED = ("adapter", "adapter_args")
# The value where the config names none.
UNNAMED = "default"
# Sorts of edges from none to all, then those that depend on the experts.
EDGE_SORTS = ("none", "random", "ring", "complete", "similarity", "learned", "explicit")


@dataclass(frozen=True)
class Panel:
    """The settings of one field.

    Attributes:
        field: Name of the field.
        label: How it is shown.
        points: (value as text, variant) in ascending order; the reference is one of them.
    """

    field: str
    label: str
    points: tuple[tuple[str, str], ...]


def sweep_panels(scores: ModelScores, reference: str | None) -> list[Panel]:
    """Panels of the fields that at least one variant changes alone.

    Args:
        scores: Scores of one model.
        reference: Variant that the others are variations of.
    """
    if reference is None or reference not in scores.trained:
        return []
    own = _run_by_place(scores, reference)
    points: dict[str, list[tuple[Any, str]]] = {field: [] for field in FIELDS}
    for variant in scores.trained:
        if variant == reference:
            continue
        pairs = [(own[place], run) for place, run in _run_by_place(scores, variant).items() if place in own]
        if pairs and (field := changed_field(settings(pairs[0][0]), settings(pairs[0][1]))):
            points[field].append((_value(pairs[0][1], field), variant))
    first = next(iter(own.values()))
    return [
        Panel(field, label, _ordered([*points[field], (_value(first, field), reference)]))
        for field, label in FIELDS.items()
        if points[field]
    ]


def settings(run: Run) -> dict[str, Any]:
    """The options of a run on one level."""
    config = run.record.config
    flat = dict(config)
    for name in NESTED:
        flat |= config[name] if isinstance(config.get(name), Mapping) else {}
    return flat


def changed_field(reference: Mapping[str, Any], variant: Mapping[str, Any]) -> str | None:
    """The one field of `FIELDS` that a variant changes; `None` where it changes another or several."""
    names = (set(reference) | set(variant)) - IGNORED
    changed = {name for name in names if reference.get(name) != variant.get(name)}
    for field in ("num_experts", "top_k", "r"):
        if field in changed and changed <= {field} | COMPANIONS.get(field, set()):
            return field
    if not changed or not changed <= EDGES:
        return None
    if "edges" in changed or ("edge_init" in changed and variant.get("edge_init") not in (None, "random")):
        return "edge_init"
    return next((field for field in ("edge_density", "graph_seed", "edge_init") if field in changed), None)


def _run_by_place(scores: ModelScores, variant: str) -> dict[tuple[str, int], Run]:
    return {(run.task, run.seed): run for run in variant_runs(scores, variant)}


def _value(run: Run, field: str) -> Any:
    value = settings(run).get(field)
    if field == "num_experts" and value is None:
        blocks = (run.record.metrics.get("routing") or {}).values()
        value = max((len(block.get("expert_load") or ()) for block in blocks), default=0) or None
    if field == "edge_init" and settings(run).get("edges"):
        return "explicit"
    return value


def _ordered(points: list[tuple[Any, str]]) -> tuple[tuple[str, str], ...]:
    def place(point: tuple[Any, str]) -> tuple[float, list[Any]]:
        value, _ = point
        if isinstance(value, (int, float)):
            return float(value), []
        return (
            -1.0 if value is None else EDGE_SORTS.index(value) if value in EDGE_SORTS else float("inf")
        ), natural(str(value))

    return tuple((_shown(value), variant) for value, variant in sorted(points, key=place))


def _shown(value: Any) -> str:
    if value is None:
        return UNNAMED
    return f"{value:g}" if isinstance(value, (int, float)) else str(value)
