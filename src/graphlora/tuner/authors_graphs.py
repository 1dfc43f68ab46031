"""The expert graphs of an authors' checkpoint, which holds none: given by the user, or rebuilt."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file
from torch import Tensor
from transformers.activations import ACT2FN

from graphlora.errors import GraphLoraError
from graphlora.graph import adjacency_from_edges, similarity_edges
from graphlora.tuner.authors_checkpoint import AuthorsCheckpoint
from graphlora.untrusted import parse_json, read_text

Edges = Sequence[Sequence[int]]


def rebuilt_graphs(checkpoint: AuthorsCheckpoint, act_name: str, edge_density: float) -> list[Tensor]:
    """The graph of each layer, `[N, N]`, searched in the stored expert features as the released code does on loading.

    Args:
        checkpoint: a checkpoint with graph routers.
        act_name: the base model's FFN activation, by transformers' name.
        edge_density: their similarity threshold.

    Raises:
        GraphLoraError: for an unknown activation.
    """
    if act_name not in ACT2FN:
        raise GraphLoraError(f"hidden_act={act_name!r} of the base model is unknown; give the graph instead.")
    act = ACT2FN[act_name]
    features = (act(layer["gate.X"] @ layer["gate.mlp_struct.weight"].T) for layer in checkpoint.layers)
    edges = (similarity_edges(nodes, edge_density) for nodes in features)
    return [adjacency_from_edges(checkpoint.num_experts, pairs) for pairs in edges]


def given_graphs(graph: str | Path | Edges, num_layers: int, num_experts: int) -> list[Tensor]:
    """The graph of each layer, `[N, N]` with zero diagonal; `import_checkpoint` says what `graph` may be.

    Raises:
        GraphLoraError: for a file that cannot be read, and for edges or matrices that are no graph of these experts.
    """
    if not isinstance(graph, (str, Path)):
        return [adjacency_from_edges(num_experts, _pairs(graph, "graph"))] * num_layers
    path = Path(graph)
    if path.suffix == ".safetensors":
        return _adjacencies(path, num_layers, num_experts)
    try:
        content = parse_json(read_text(path, "a graph"), str(path))
    except GraphLoraError as error:
        raise GraphLoraError(
            f"graph {path}: {error}; give a .json file of edges or a .safetensors file."
        ) from error
    if isinstance(content, list):
        content = {str(i): content for i in range(num_layers)}
    names = [str(i) for i in range(num_layers)]
    if not isinstance(content, dict) or sorted(content) != sorted(names):
        raise GraphLoraError(
            f"graph {path} must hold a list of edges, or one per layer: 0 to {num_layers - 1}."
        )
    return [adjacency_from_edges(num_experts, _pairs(content[i], f"graph {path}, layer {i}")) for i in names]


def _pairs(edges: Any, where: str) -> list[tuple[int, int]]:
    if not isinstance(edges, Sequence) or not all(isinstance(e, Sequence) and len(e) == 2 for e in edges):
        raise GraphLoraError(f"{where} is not a list of expert pairs such as [[0, 1], [2, 5]].")
    return [(edge[0], edge[1]) for edge in edges]


def _adjacencies(path: Path, num_layers: int, num_experts: int) -> list[Tensor]:
    try:
        tensors = load_file(path)
    except (OSError, SafetensorError) as error:
        raise GraphLoraError(f"graph {path} cannot be read: {error}.") from error
    names = [f"layers.{i}.adjacency" for i in range(num_layers)]
    if sorted(tensors) != sorted(names):
        raise GraphLoraError(
            f"graph {path} must hold {names[0]} to {names[-1]}; it has {', '.join(tensors)}."
        )
    return [_checked_adjacency(tensors[name].float(), num_experts, f"{path}, {name}") for name in names]


def _checked_adjacency(matrix: Tensor, num_experts: int, where: str) -> Tensor:
    """The block of the experts, zero diagonal; the diagonal that is given has no meaning."""
    if matrix.shape not in ((num_experts,) * 2, (num_experts + 1,) * 2):
        raise GraphLoraError(
            f"graph {where} has shape {list(matrix.shape)}; expected {[num_experts] * 2} or {[num_experts + 1] * 2}."
        )
    token = matrix[num_experts:, :num_experts]
    experts = matrix[:num_experts, :num_experts].clone().fill_diagonal_(0)
    binary = bool(((experts == 0) | (experts == 1)).all())
    if not binary or not torch.equal(experts, experts.T) or not bool((token == 1).all()):
        raise GraphLoraError(
            f"graph {where} must be symmetric, of zeros and ones, with the token joined to every expert."
        )
    return experts
