"""`graphlora info`: what an adapter is, read from its files alone."""

from __future__ import annotations

import json
import math
from itertools import combinations
from pathlib import Path
from typing import Any

from jsonargparse import ArgumentParser, Namespace

from graphlora.adapter_table import check_top_k
from graphlora.cli.parsing import make_parser
from graphlora.errors import GraphLoraError, one_line
from graphlora.training.adapter_files import AdapterFiles, read_adapter

DESCRIPTION = """\
Say what an adapter is: method, base model, sizes, the graph between its experts, how much each expert of
each FFN block was used in training, lambda and sigma, and the record of the run that made it. Reads the
adapter's files only; the base model is not loaded."""
EXAMPLE = """
graphlora info runs/arc
graphlora info runs/arc --json | jq .layers[0].expert_load
"""
SHOWN = (
    "preset",
    "num_experts",
    "num_experts_by_layer",
    "top_k",
    "r",
    "lora_alpha",
    "lora_dropout",
    "expert_granularity",
    "router_type",
    "router_scope",
    "router_gate",
    "router_conv",
    "router_num_layers",
    "router_hidden_size",
    "edge_init",
    "edge_density",
    "target_modules",
    "attention_target_modules",
    "attention_experts",
    "modules_to_save",
)
BLOCKS = " ▁▂▃▄▅▆▇█"
MAX_LINE = 10_000
LOAD, GRAPH = ".graphlora_coordination.cumulative_weights", ".graphlora_router.adjacency"
GATES = ".graphlora_router.edge_logits"
RATE, SCALE = ".graphlora_coordination.poisson_rate_bias", ".graphlora_coordination.normal_scale_bias"


def build_parser() -> ArgumentParser:
    """Parser of the command."""
    parser = make_parser("graphlora info ADAPTER [--json]", DESCRIPTION, EXAMPLE)
    parser.add_argument("adapter", type=str, help="directory of the adapter")
    parser.add_argument("--json", action="store_true", help="print one JSON object")
    return parser


def run(arguments: Namespace) -> None:
    """Print it."""
    facts = describe(read_adapter(arguments.adapter))
    print(json.dumps(facts, indent=2) if arguments.json else as_text(facts))


def describe(files: AdapterFiles) -> dict[str, Any]:
    """Everything the command shows, as JSON values."""
    loads, graphs, gates = files.tensors(LOAD), files.tensors(GRAPH), files.tensors(GATES)
    rates, scales = files.tensors(RATE), files.tensors(SCALE)
    layers = []
    for name in loads:
        layer: dict[str, Any] = {"module": name, "expert_load": _shares(loads[name])}
        if name in rates and name in scales:
            layer["poisson_rate"] = _rate(float(rates[name]), files.config)
            layer["normal_scale"] = _scale(float(scales[name]), len(loads[name]), files.config)
        if name in graphs:
            layer["adjacency"] = (
                _from_gates(gates[name].tolist(), len(loads[name]))
                if name in gates
                else graphs[name].tolist()
            )
        layers.append(layer)
    record = files.path / "record.json"
    return {
        "adapter": str(files.path),
        "method": str(files.config["peft_type"]),
        "base_model": files.base_model,
        "num_parameters": files.num_parameters,
        "num_bytes": files.num_bytes,
        "dtypes": sorted(set(files.dtypes.values())),
        "options": {name: files.config[name] for name in SHOWN if files.config.get(name) is not None},
        "refused": _refusal(files.config),
        "layers": sorted(layers, key=lambda layer: _natural(layer["module"])),
        "record": _read_record(record),
    }


def as_text(facts: dict[str, Any]) -> str:
    """The description for a terminal."""
    options = ", ".join(f"{name} {_plain(value)}" for name, value in facts["options"].items())
    lines = [
        f"{facts['method']} adapter in {facts['adapter']}",
        f"base model   {facts['base_model']}",
        f"size         {facts['num_parameters']:,} values ({', '.join(facts['dtypes'])}), "
        f"{facts['num_bytes'] / 1e6:.1f} MB",
        f"options      {options}",
    ]
    if facts["refused"]:
        lines.append(f"refused      it cannot be loaded: {facts['refused']}")
    lines += _record_lines(facts["record"])
    if facts["layers"]:
        lines += ["", *_load_lines(facts["layers"]), "", *_graph_lines(facts["layers"])]
    # What files say is shown without letting it drive the terminal.
    return "\n".join(one_line(line, MAX_LINE) for line in lines)


def _refusal(config: dict[str, Any]) -> str | None:
    """Why an adapter whose tensors fit its configuration cannot be loaded all the same; None where it can."""
    top_k, num_experts = config.get("top_k"), config.get("num_experts")
    try:
        if isinstance(top_k, int) and isinstance(num_experts, int):
            check_top_k(top_k, num_experts)
    except GraphLoraError as error:
        return str(error)
    return None


def _record_lines(record: dict[str, Any] | None) -> list[str]:
    if record is None:
        return ["record       none (record.json is not there)"]
    config, metrics = record.get("config", {}), record.get("metrics", {})
    values = {key: value for key, value in metrics.items() if key.startswith("eval_") and value is not None}
    shown = ", ".join(f"{key.removeprefix('eval_')} {value:.4f}" for key, value in values.items())
    commit = (record.get("provenance", {}).get("commit") or "unknown")[:12]
    return [
        f"trained on   {config.get('task')}, {metrics.get('steps')} steps, seed {record.get('seed')}; "
        f"kept step {metrics.get('kept_step')}",
        f"validation   {shown or 'none'}",
        f"made         {record.get('created')} at commit {commit}, on {record.get('device')} "
        f"in {record.get('dtype')}",
    ]


def _load_lines(layers: list[dict[str, Any]]) -> list[str]:
    """One line per block: a bar per expert, full height at twice the fair share."""
    lines = ["expert load per router (a bar per expert; full: twice the fair share)"]
    width = max(len(layer["module"]) for layer in layers)
    for layer in layers:
        load = layer["expert_load"]
        if load is None:
            lines.append(f"  {layer['module']:<{width}}  not trained yet")
            continue
        bars = "".join(BLOCKS[min(8, round(4 * share * len(load)))] for share in load)
        dead = sum(share * len(load) < 0.05 for share in load)
        note = f", {dead} below 5% of its share" if dead else ""
        lines.append(
            f"  {layer['module']:<{width}}  {bars}  largest {max(load) * len(load):.2f}x, "
            f"smallest {min(load) * len(load):.2f}x the fair share{note}{_distributions(layer)}"
        )
    return lines


def _distributions(layer: dict[str, Any]) -> str:
    if "poisson_rate" not in layer:
        return ""
    return f", lambda {layer['poisson_rate']:.3f}, sigma {layer['normal_scale']:.2f}"


def _graph_lines(layers: list[dict[str, Any]]) -> list[str]:
    """Edges between experts; blocks with the same graph share a line."""
    graphs: dict[str, list[str]] = {}
    for layer in layers:
        if "adjacency" in layer:
            graphs.setdefault(_edges_text(layer["adjacency"]), []).append(layer["module"])
    if not graphs:
        return ["no expert graph (linear router)"]
    lines = ["expert graph (edges between experts; the token is joined to all)"]
    for edges, modules in graphs.items():
        others = f" and {len(modules) - 1} more" if len(modules) > 1 else ""
        lines.append(f"  {modules[0]}{others}: {edges}")
    return lines


def _edges_text(adjacency: list[list[float]]) -> str:
    edges = [
        f"{first}-{second}" + ("" if value == 1 else f" ({value:.2f})")
        for first, row in enumerate(adjacency)
        for second, value in enumerate(row)
        if second > first and value >= 0.01
    ]
    return ", ".join(edges) or "none"


def _shares(weights: Any) -> list[float] | None:
    total = float(weights.sum())
    if float(weights.min()) < 0:
        return None
    return [round(float(value) / total, 6) for value in weights] if total > 0 else None


def _rate(bias: float, config: dict[str, Any]) -> float:
    """Lambda of a block, from the offset that is stored."""
    smooth = config.get("poisson_rate_form", "smooth") == "smooth"
    return 1 + 1 / (1 + math.exp(min(-bias, 50.0))) if smooth else min(2.0, max(1.0, 1.5 + bias))


def _scale(bias: float, num_experts: int, config: dict[str, Any]) -> float:
    """Sigma of a block, from the offset that is stored."""
    bounded = config.get("normal_scale_form", "bounded") == "bounded"
    return num_experts / 4 * (1 + math.exp(min(bias, 50.0))) if bounded else num_experts / 2 + bias


def _from_gates(logits: list[float], num_experts: int) -> list[list[float]]:
    """Adjacency of learned gates, whose logits stand for the pairs of experts in order."""
    graph = [[0.0] * num_experts for _ in range(num_experts)]
    for (first, second), logit in zip(combinations(range(num_experts), 2), logits, strict=True):
        graph[first][second] = graph[second][first] = round(1 / (1 + math.exp(min(-logit, 50.0))), 4)
    return graph


def _read_record(path: Path) -> dict[str, Any] | None:
    if not path.is_file():
        return None
    from dataclasses import asdict

    from graphlora.records import RunRecord

    return asdict(RunRecord.read(path))


def _natural(name: str) -> list[tuple[int, str]]:
    """Order in which layer 2 comes before layer 10."""
    return [(int(part), "") if part.isdigit() else (-1, part) for part in name.split(".")]


def _plain(value: Any) -> str:
    return " ".join(map(str, value)) if isinstance(value, list) else str(value)
