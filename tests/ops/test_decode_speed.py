# ruff: noqa: T201
"""Times of the decode kernels in CUDA graphs, at the Llama3-8B shape; printed, run with -s."""

import pytest
import torch
from torch.nn import functional as F

from graphlora.moe_decode import moe_ffn_decode
from graphlora.ops import decode
from graphlora.ops.expert_ffn import ExpertWeights, FrozenFfn
from graphlora.ops.expert_ffn.activations import DifferentiableAct
from graphlora.router import GraphRouter, build_adjacency

pytestmark = pytest.mark.gpu
D, WIDE, NUM_EXPERTS, TOP_K, R, WIDTH = 4096, 14336, 8, 2, 8, 64
COPIES, REPLAYS = 20, 30


def captured_time(work) -> float:
    """Microseconds of one call in a row of calls, each behind the other, in one graph."""
    stream = torch.cuda.Stream()
    with torch.cuda.stream(stream), torch.no_grad():
        work()
        work()
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.no_grad(), torch.cuda.graph(graph, stream=stream):
        kept = [work() for _ in range(COPIES)]
    times = []
    for _ in range(REPLAYS):
        start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        start.record()
        graph.replay()
        end.record()
        end.synchronize()
        times.append(1000 * start.elapsed_time(end) / COPIES)
    del kept
    return sorted(times)[len(times) // 2]


def random(*shape: int, dtype: torch.dtype = torch.float32) -> torch.Tensor:
    return torch.randn(shape, device="cuda", dtype=dtype) * shape[-1] ** -0.5


@pytest.mark.parametrize("tokens", [1, 8, 64])
def test_times(tokens):
    torch.manual_seed(0)
    x = torch.randn(tokens, D, device="cuda", dtype=torch.bfloat16)
    W_gate, W_up, W_down = (random(*s, dtype=torch.bfloat16) for s in ((WIDE, D), (WIDE, D), (D, WIDE)))
    sizes = [(NUM_EXPERTS, R, D), (NUM_EXPERTS, WIDE, R)] * 2 + [(NUM_EXPERTS, R, WIDE), (NUM_EXPERTS, D, R)]
    experts = ExpertWeights(*(random(*s) for s in sizes))
    ffn = FrozenFfn(lambda x: (x @ W_gate.T, x @ W_up.T), lambda h: h @ W_down.T, DifferentiableAct(F.silu))
    router = GraphRouter(
        D, NUM_EXPERTS, width=WIDTH, num_layers=2, act=ffn.act,
        adjacency=build_adjacency(NUM_EXPERTS, "random", 0.5, 0), conv="gcn", expert_features="embedding",
        self_term="weight", self_term_weight=0.5, input_gain=1.0, input_norm=True, edge_density=0.5,
        learned_edges=False, centering=True, seed=0, spread=1.0,
    ).cuda()  # fmt: skip
    with torch.no_grad():
        (gate, up), routing = ffn.project_in(x), router.route(x, "triton", TOP_K)
        A, B = experts.gate_A[0], random(D, R)
        low, _ = decode.project(
            x, experts.gate_A.flatten(0, 1), experts.up_A.flatten(0, 1), router.token_proj
        )
        args = (gate, up, low, experts.gate_B, experts.up_B, experts.down_A, routing.top_k_weights)
        mixed, partial = decode.mix(*args, routing.top_k_index, 2.0, "silu")
        low_down, base, pair = partial.sum(dim=0), ffn.project_out(mixed), decode.low_rank(x, [A])
    works = {
        "project (side branch)": lambda: decode.project(
            x, experts.gate_A.flatten(0, 1), experts.up_A.flatten(0, 1), router.token_proj
        ),
        "low_rank of q, k and v (side branch)": lambda: decode.low_rank(x, [A] * 3),
        "sum of partials (side branch)": lambda: partial.sum(dim=0),
        "add_low_rank": lambda: decode.add_low_rank(pair, [base], [B], 2.0),
        "mix": lambda: decode.mix(*args, routing.top_k_index, 2.0, "silu"),
        "frozen silu and product, which mix replaces": lambda: F.silu(gate) * up,
        "combine": lambda: decode.combine(base, low_down, routing.top_k_index, experts.down_B, 2.0),
        "FFN block, frozen": lambda: ffn.project_out(F.silu(x @ W_gate.T) * (x @ W_up.T)),
        "FFN block, adapted": lambda: moe_ffn_decode(x, ffn, experts, router, (TOP_K, True), 2.0)[0],
    }
    times = {name: captured_time(work) for name, work in works.items()}
    print(f"\n{tokens} tokens, microseconds per call in a CUDA graph:")
    for name, time in times.items():
        print(f"  {name:<45}{time:8.2f}")
    ratio = times["FFN block, adapted"] / times["FFN block, frozen"]
    print(f"  FFN block, adapted / frozen {ratio:.3f}")
    assert ratio < 1.5
