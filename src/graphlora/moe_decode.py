"""Equations 4 and 5 for a few tokens without gradients, as in decoding. ops/decode/README.md has the reasoning."""

from __future__ import annotations

from torch import Tensor

from graphlora.ops.decode import combine, mix, project, run_beside
from graphlora.ops.expert_ffn import ExpertWeights, FrozenFfn
from graphlora.router import CenteredRouter, GraphRouter, Routing


def moe_ffn_decode(
    x: Tensor,
    ffn: FrozenFfn,
    experts: ExpertWeights,
    router: CenteredRouter,
    selection: tuple[int, bool],
    scaling: float,
) -> tuple[Tensor, Routing]:
    """Output of a gated FFN block with routed LoRA experts, and the routing; the same function as in training.

    Routing and low-rank inputs hide behind the frozen gate and up projections where a CUDA graph is captured, and the
    sum of the low-rank outputs behind the down projection.

    Args:
        x: `[tokens, d]`, at most 64 tokens.
        ffn: the frozen block.
        experts: stacked low-rank pairs, in any floating dtype.
        router: the block's router.
        selection: top_k and norm_topk_prob.
        scaling: s = lora_alpha / r.

    Returns:
        `[tokens, d]` in the dtype that the frozen block gives, and the routing.
    """
    (gate, up), (low, routing) = run_beside(
        lambda: ffn.project_in(x), lambda: _beside_projections(x, experts, router, selection), x.device
    )
    assert gate is not None
    assert experts.gate_B is not None
    act = ffn.act.name
    assert act is not None
    mixed, partial = mix(
        gate, up, low, experts.gate_B, experts.up_B, experts.down_A,
        routing.top_k_weights, routing.top_k_index, scaling, act,
    )  # fmt: skip
    out, low_down = run_beside(lambda: ffn.project_out(mixed), lambda: partial.sum(dim=0), x.device)
    return combine(out, low_down, routing.top_k_index, experts.down_B, scaling), routing


def _beside_projections(
    x: Tensor, experts: ExpertWeights, router: CenteredRouter, selection: tuple[int, bool]
) -> tuple[Tensor, Routing]:
    """Low-rank inputs of all experts, `[tokens, 2 N r + any]`, and the routing."""
    assert experts.gate_A is not None
    top_k, norm_topk_prob = selection
    weights = None
    # Offloaded weights come with the router's own call alone.
    if isinstance(router, GraphRouter) and not hasattr(router, "_hf_hook"):
        weights = router.fused_weights(top_k)
    token_proj = (
        x.new_empty(0, x.shape[1], dtype=experts.up_A.dtype) if weights is None else weights.token_proj
    )
    low, square_sum = project(x, experts.gate_A.flatten(0, 1), experts.up_A.flatten(0, 1), token_proj)
    if weights is None:
        return low, router.route(x, "triton", top_k, norm_topk_prob)
    from graphlora.ops.graph_route.triton import prepare_router, route_from_projection

    z = low[:, low.shape[1] - token_proj.shape[0] :]
    routed = route_from_projection(
        z,
        None if weights.eps is None else square_sum,
        prepare_router(weights, x.dtype),
        top_k,
        norm_topk_prob,
    )
    return low, Routing(*routed)
