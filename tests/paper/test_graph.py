"""Section 4.1: which experts are joined, and the normalized adjacency of eq. 4."""

from fractions import Fraction
from math import ceil, sqrt

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from graphlora import graph
from graphlora.errors import GraphLoraError
from graphlora.losses import edge_density_penalty
from graphlora.router import build_adjacency


def adjacency(num_experts, *edges):
    return graph.adjacency_from_edges(num_experts, edges)


@st.composite
def adjacencies(draw, max_experts=9):
    num_experts = draw(st.integers(2, max_experts))
    pairs = graph.all_pairs(num_experts)
    return adjacency(num_experts, *draw(st.lists(st.sampled_from(pairs), unique=True)))


# --- number of edges and random graphs ---------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("num_experts", "density", "edges"),
    [
        (8, 0.1, 3),  # 2.8 pairs
        (8, 0.25, 7),  # 7 exactly
        (8, 0.8, 23),  # 22.4
        (4, 0.1, 1),  # 0.6
        (12, 0.2, 14),  # 13.2
        (16, 0.1, 12),  # 12 exactly
        (8, 0.0, 0),
        (8, 1.0, 28),
        (1, 0.5, 0),
    ],
)
def test_number_of_edges(num_experts, density, edges):
    assert graph.num_edges(num_experts, density) == edges
    assert len(graph.random_edges(num_experts, density, seed=3)) == edges


@given(st.integers(1, 64), st.integers(0, 100))
def test_number_of_edges_rounds_up_without_rounding_errors(num_experts, percent):
    pairs = num_experts * (num_experts - 1) // 2
    assert graph.num_edges(num_experts, percent / 100) == ceil(Fraction(percent, 100) * pairs)


def test_random_graph_depends_on_its_seed_alone():
    torch.manual_seed(1)
    first = graph.random_edges(8, 0.25, seed=5)
    torch.manual_seed(2)
    state = torch.get_rng_state()
    assert graph.random_edges(8, 0.25, seed=5) == first
    assert torch.equal(torch.get_rng_state(), state)
    assert len({tuple(graph.random_edges(8, 0.25, seed)) for seed in range(20)}) == 20


def test_random_graph_draws_every_pair_equally_often():
    counts = dict.fromkeys(graph.all_pairs(8), 0)
    for seed in range(2000):
        for edge in graph.random_edges(8, 0.1, seed):
            counts[edge] += 1
    expected, deviation = 2000 * 3 / 28, sqrt(2000 * 3 / 28 * 25 / 28)
    assert all(abs(count - expected) < 4.5 * deviation for count in counts.values())


@pytest.mark.parametrize(
    ("edge_init", "edges"),
    [
        ("ring", [(0, 1), (1, 2), (2, 3), (0, 3)]),
        ("complete", [(0, 1), (0, 2), (0, 3), (1, 2), (1, 3), (2, 3)]),
        ("none", []),
        ([[3, 1]], [(1, 3)]),
    ],
)
def test_other_initial_graphs(edge_init, edges):
    built = build_adjacency(4, edge_init, 0.1, seed=0)
    assert torch.equal(built, adjacency(4, *edges))
    assert torch.equal(built, built.T)
    assert not built.diagonal().any()


@pytest.mark.parametrize(
    ("edge", "message"), [((0, 4), "0 to 3"), ((-1, 2), "0 to 3"), ((2, 2), "to itself")]
)
def test_impossible_edges_are_refused(edge, message):
    with pytest.raises(GraphLoraError, match=message):
        adjacency(4, edge)


# --- the similarity graph of the released code -------------------------------------------------------------------


@pytest.fixture
def features():
    """Eight unit vectors; cosines 0.9, -0.8, 0.7, 0.6 within the pairs 01, 23, 45, 67, and 0 between them."""
    vectors = torch.zeros(8, 8)
    for i, cosine in enumerate((0.9, -0.8, 0.7, 0.6)):
        vectors[2 * i, 2 * i] = 1.0
        vectors[2 * i + 1, 2 * i : 2 * i + 2] = torch.tensor([cosine, sqrt(1 - cosine**2)])
    return vectors * torch.arange(1.0, 9.0)[:, None]


@pytest.mark.parametrize(
    ("density", "edges"),
    [
        (0.1, []),  # the diagonal alone is 8 / 64
        (0.15, [(0, 1)]),  # 10 / 64
        (0.2, [(0, 1), (2, 3), (4, 5)]),  # 14 / 64
        (0.25, [(0, 1), (2, 3), (4, 5), (6, 7)]),  # 16 / 64
    ],
)
def test_similarity_graph_counts_the_diagonal(features, density, edges):
    assert graph.similarity_edges(features, density) == edges


# --- the normalized adjacency ------------------------------------------------------------------------------------


def test_normalized_adjacency_without_edges():
    a = 1 / sqrt(6)
    expected = torch.tensor([[1 / 2, 0, a], [0, 1 / 2, a], [a, a, 1 / 3]])
    torch.testing.assert_close(graph.normalized_adjacency(adjacency(2)), expected)


def test_normalized_adjacency_with_an_edge():
    a, b = 1 / sqrt(12), 1 / sqrt(8)
    third = 1 / 3
    expected = torch.tensor([[third, third, 0, a], [third, third, 0, a], [0, 0, 1 / 2, b], [a, a, b, 1 / 4]])
    torch.testing.assert_close(graph.normalized_adjacency(adjacency(3, (0, 1))), expected)
    with_diagonal = adjacency(3, (0, 1)) + torch.eye(3)
    torch.testing.assert_close(graph.normalized_adjacency(with_diagonal), expected)


@given(adjacencies(), st.randoms(use_true_random=False))
def test_normalized_adjacency_of_any_graph(joined, random):
    normalized = graph.normalized_adjacency(joined)
    assert torch.equal(normalized, normalized.T)
    assert torch.linalg.eigvalsh(normalized).abs().max() < 1 + 1e-5
    order = list(range(len(joined)))
    random.shuffle(order)
    permuted = graph.normalized_adjacency(joined[order][:, order])
    order.append(len(joined))
    torch.testing.assert_close(permuted, normalized[order][:, order])


# --- twins -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("num_experts", "edges", "twins"),
    [
        (4, [(0, 1)], [(0, 1)]),
        (4, [(0, 1), (1, 2)], []),
        (4, [(0, 1), (2, 3)], [(0, 1), (2, 3)]),
        (4, [], []),
        (3, [(0, 1), (1, 2), (0, 2)], [(0, 1), (0, 2), (1, 2)]),
        (5, [(0, 1), (0, 2), (1, 2), (2, 3)], [(0, 1)]),
    ],
)
def test_twins(num_experts, edges, twins):
    assert graph.twin_experts(adjacency(num_experts, *edges)) == twins


@given(adjacencies())
def test_twins_are_the_equal_rows_of_the_normalized_adjacency(joined):
    rows = graph.normalized_adjacency(joined)[:-1]
    equal = [(i, j) for i, j in graph.all_pairs(len(joined)) if torch.allclose(rows[i], rows[j])]
    assert graph.twin_experts(joined) == equal


@pytest.mark.parametrize(("density", "share"), [(0.1, 0.65), (0.8, 0.86)])
def test_share_of_random_graphs_with_twins(density, share):
    graphs = (adjacency(8, *graph.random_edges(8, density, seed)) for seed in range(1000))
    assert sum(bool(graph.twin_experts(joined)) for joined in graphs) / 1000 == pytest.approx(share, abs=0.04)


# --- learned edges -----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("num_experts", [4, 8, 16])
@pytest.mark.parametrize("density", [0.05, 0.1, 0.25, 0.5, 0.8, 0.95])
def test_learned_gates_start_at_the_density_and_from_the_random_graph(num_experts, density):
    joined = adjacency(num_experts, *graph.random_edges(num_experts, density, seed=0))
    gates = torch.sigmoid(graph.edge_gate_logits(joined, density))
    assert float(gates.mean()) == pytest.approx(density, abs=0.02)
    matrix = graph.adjacency_from_gates(torch.logit(gates), num_experts)
    assert torch.equal(matrix, matrix.T)
    assert not matrix.diagonal().any()
    others = ~joined.bool() & ~torch.eye(num_experts, dtype=torch.bool)
    if others.any():
        assert matrix[joined.bool()].min() > matrix[others].max()


def test_penalty_of_learned_gates():
    gates = torch.tensor([0.2, 0.4, 0.6], requires_grad=True)
    penalty = edge_density_penalty(gates, 0.1)
    assert penalty.item() == pytest.approx(0.3**2)
    penalty.backward()
    torch.testing.assert_close(gates.grad, torch.full((3,), 2 * 0.3 / 3))
    assert edge_density_penalty(torch.tensor([0.05, 0.15]), 0.1).item() == pytest.approx(0, abs=1e-12)
    assert edge_density_penalty(torch.zeros(0), 0.1) == 0
