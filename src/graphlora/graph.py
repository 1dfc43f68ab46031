"""The MoE graph of paper section 4.1: which experts are joined, and the normalized adjacency.

The graph has `num_experts` expert nodes and one token node that is joined to every expert. It is the same for every
token, so one small dense matrix stands for it. An adjacency here is the expert-expert block alone: a symmetric
`[num_experts, num_experts]` float tensor with a zero diagonal; the token node is added by `normalized_adjacency`.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence

import torch
from torch import Tensor

from graphlora.errors import GraphLoraError

Edge = tuple[int, int]


def num_edges(num_experts: int, edge_density: float) -> int:
    """Number of undirected edges at a density: `ceil(density * N (N - 1) / 2)`.

    Args:
        num_experts: N, the number of expert nodes.
        edge_density: share of all expert pairs that are joined, in [0, 1].
    """
    return math.ceil(round(edge_density * num_experts * (num_experts - 1) / 2, 9))


def random_edges(num_experts: int, edge_density: float, seed: int) -> list[Edge]:
    """Expert pairs drawn without replacement (paper section 4.1).

    The draw uses a generator of its own on the CPU, so it is the same on every rank and device.
    """
    generator = torch.Generator().manual_seed(seed)
    pairs = all_pairs(num_experts)
    chosen = torch.randperm(len(pairs), generator=generator)[: num_edges(num_experts, edge_density)]
    return [pairs[i] for i in sorted(chosen.tolist())]


def ring_edges(num_experts: int) -> list[Edge]:
    """Each expert joined to the next one, the last to the first."""
    if num_experts < 3:
        return all_pairs(num_experts)
    return [(i, (i + 1) % num_experts) for i in range(num_experts)]


def all_pairs(num_experts: int) -> list[Edge]:
    """All `N (N - 1) / 2` expert pairs `(i, j)` with `i < j`, in lexicographic order."""
    return [(i, j) for i in range(num_experts) for j in range(i + 1, num_experts)]


def similarity_edges(features: Tensor, edge_density: float) -> list[Edge]:
    """The graph of the authors' released code: pairs whose features point the same way.

    The cosine threshold falls from 1.00 in steps of 0.01 until the share of `|cosine| >= threshold`, counted in the
    N x N matrix *including its diagonal*, reaches `edge_density`. At density 0.1 and 8 experts the diagonal alone
    suffices, and no two experts are joined.

    Args:
        features: initial projected expert features, `[num_experts, router_hidden_size]`.
        edge_density: share of the entries of the N x N matrix, in [0, 1].
    """
    unit = torch.nn.functional.normalize(features.detach().float(), dim=-1)
    similarity = (unit @ unit.T).abs()
    similarity.fill_diagonal_(1.0)
    for percent in range(100, -1, -1):
        joined = similarity >= percent / 100
        if joined.float().mean() >= edge_density:
            break
    return [(i, j) for i, j in all_pairs(len(features)) if joined[i, j]]


def adjacency_from_edges(num_experts: int, edges: Iterable[Sequence[int]]) -> Tensor:
    """Expert-expert adjacency `[num_experts, num_experts]` (0 or 1, zero diagonal) of an edge list.

    Raises:
        GraphLoraError: if an edge names an expert that does not exist, or joins an expert to itself.
    """
    adjacency = torch.zeros(num_experts, num_experts)
    for edge in edges:
        i, j = _checked_edge(num_experts, edge)
        adjacency[i, j] = adjacency[j, i] = 1.0
    return adjacency


def _checked_edge(num_experts: int, edge: Sequence[int]) -> Edge:
    pair = tuple(edge)
    if len(pair) != 2 or not all(isinstance(i, int) and 0 <= i < num_experts for i in pair):
        raise GraphLoraError(
            f"edges: {list(pair)} is not a pair of experts; experts are numbered 0 to {num_experts - 1}."
        )
    if pair[0] == pair[1]:
        raise GraphLoraError(
            f"edges: {list(pair)} joins expert {pair[0]} to itself; self-loops are always there."
        )
    return pair[0], pair[1]


def normalized_adjacency(adjacency: Tensor) -> Tensor:
    """GCN normalization `D^-1/2 (A + I) D^-1/2` with the token node added last (paper eq. 4).

    Args:
        adjacency: expert-expert block `[num_experts, num_experts]`, values in [0, 1]; its diagonal is ignored.

    Returns:
        `[num_experts + 1, num_experts + 1]`, float32; differentiable in `adjacency`.
    """
    experts = adjacency.float()
    full = torch.nn.functional.pad(experts, (0, 1, 0, 1), value=1.0)
    eye = torch.eye(full.shape[0], device=full.device, dtype=full.dtype)
    full = full * (1 - eye) + eye
    inv_sqrt_degree = full.sum(dim=1).rsqrt()
    return inv_sqrt_degree[:, None] * full * inv_sqrt_degree[None, :]


def twin_experts(adjacency: Tensor) -> list[Edge]:
    """Pairs of experts with the same closed neighborhood.

    Without a self term their rows of the normalized adjacency are equal, hence their router logits are equal for every
    token whatever the weights.
    """
    closed = (adjacency.detach().cpu() > 0).clone()
    closed.fill_diagonal_(True)
    return [(i, j) for i, j in all_pairs(len(closed)) if torch.equal(closed[i], closed[j])]


def edge_gate_logits(adjacency: Tensor, edge_density: float) -> Tensor:
    """Initial logits of the learned edge gates, `[N (N - 1) / 2]` in the order of `all_pairs`.

    The pairs joined in `adjacency` start at gate 0.75 and the others share what is left, at most 0.5; where that does
    not make the mean gate `edge_density`, the joined pairs' gate does. All gates stay within [0.02, 0.98].
    """
    num_experts = adjacency.shape[0]
    rows, cols = torch.triu_indices(num_experts, num_experts, offset=1)
    joined = adjacency[rows, cols] > 0
    num_joined, num_other = int(joined.sum()), int((~joined).sum())
    sum_of_gates = edge_density * len(joined)
    other = min(max((sum_of_gates - 0.75 * num_joined) / max(num_other, 1), 0.02), 0.5)
    own = min(max((sum_of_gates - other * num_other) / max(num_joined, 1), 0.02), 0.98)
    gates = torch.where(joined, own, other)
    return torch.logit(gates)


def adjacency_from_gates(gate_logits: Tensor, num_experts: int) -> Tensor:
    """Symmetric `[num_experts, num_experts]` adjacency of gates `sigmoid(gate_logits)`, zero diagonal."""
    rows, cols = torch.triu_indices(num_experts, num_experts, offset=1, device=gate_logits.device)
    upper = gate_logits.new_zeros(num_experts, num_experts, dtype=torch.float32)
    upper = upper.index_put((rows, cols), torch.sigmoid(gate_logits.float()))
    return upper + upper.T
