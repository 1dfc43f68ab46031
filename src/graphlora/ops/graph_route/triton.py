"""The graph router in fused kernels: from tokens to the routing, forward and backward. README.md has the derivation."""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
from torch import Tensor

from graphlora.ops.graph_route import triton_launch as launch
from graphlora.ops.operations import operation

_ACTIVATIONS = ("silu", "gelu", "gelu_tanh", "relu")
MAX_EXPERTS, MAX_WIDTH, MAX_TOP_K = 64, 256, 8


class RouterWeights(NamedTuple):
    """A graph router of two `"gcn"` layers, as the kernels take it; weights in any floating dtype.

    Attributes:
        token_proj: P_x, `[g, d]`.
        features: expert features before their activation, `[N, g]`.
        conv: W_l, `[2, g, g]`.
        self_weight: S_l, `[2, g, g]`, for the self term `"weight"`; else None.
        out: p, `[g]`.
        graph: adjacency of the experts `[N, N]` with a zero diagonal, float32, without a gradient; or Â of experts and
            token, `[N + 1, N + 1]`, float32, which may have one.
        logit_offset: subtracted from the logits, `[N]`, float32; None for nothing.
        residual: a of the self term `"residual"`; 0 without one.
        act: name of the activation.
        eps: added to the mean square of a token, whose root divides it; None where tokens are not normalized.
    """

    token_proj: Tensor
    features: Tensor
    conv: Tensor
    self_weight: Tensor | None
    out: Tensor
    graph: Tensor
    logit_offset: Tensor | None
    residual: float
    act: str
    eps: float | None


class Beside(NamedTuple):
    """What `graph_route_beside` gives besides the routing.

    Attributes:
        x: the tokens, for all further uses: the gradient that they give is added in the router's own kernel.
        low: `x [gate_A; up_A]^T`, `[tokens, 2 N r]`, float32; None where no matrices were given.
    """

    x: Tensor
    low: Tensor | None


class PreparedRouter(NamedTuple):
    """What `prepare_router` makes of the weights; valid until they change.

    Attributes:
        weights: the weights themselves.
        static: the token-independent terms.
        conv: W_l for the products.
        self_weight: S_l for the products, or None.
        precise: whether the products are float32 ones.
    """

    weights: RouterWeights
    static: Tensor
    conv: Tensor
    self_weight: Tensor | None
    precise: bool


def supports(conv: str, num_layers: int, act: str | None, width: int, num_experts: int, top_k: int) -> bool:
    """Whether the kernels can run such a router; other routers take the PyTorch path."""
    return (
        conv == "gcn"
        and num_layers == 2
        and act in _ACTIVATIONS
        and width <= MAX_WIDTH
        and num_experts <= MAX_EXPERTS
        and top_k <= MAX_TOP_K
    )


def graph_route_triton(
    x: Tensor, weights: RouterWeights, top_k: int, norm_topk_prob: bool = True
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Routing of every token, differentiable in x and all weights.

    Saved for backward: x, the sums of its squares `[tokens]`, the token projection and v `[tokens, g]` each (and q with
    a self weight), probabilities and selection.

    Args:
        x: `[tokens, d]`, bfloat16, float16 (products take float16 node features) or float32 (float32 products).
        weights: see `RouterWeights`.
        top_k: K.
        norm_topk_prob: divide the selected probabilities by their sum.

    Returns:
        router_logits and router_probs `[tokens, N]`, top_k_weights `[tokens, K]`, float32, and top_k_index
        `[tokens, K]`, int64, in descending order of probability; ties go to the lowest index.
    """
    return graph_route_beside(x, weights, top_k, norm_topk_prob)[0]


def graph_route_beside(
    x: Tensor,
    weights: RouterWeights,
    top_k: int,
    norm_topk_prob: bool = True,
    matrices: tuple[Tensor, Tensor] | None = None,
) -> tuple[tuple[Tensor, Tensor, Tensor, Tensor], Beside]:
    """`graph_route_triton` for a block that has its own products with the same tokens.

    Args:
        x: see `graph_route_triton`.
        weights: likewise.
        top_k: likewise.
        norm_topk_prob: likewise.
        matrices: A of gate and up, `[N, r, d]` each, of one size. Their product with x and P_x's become one, forward
            and backward.

    Returns:
        What `graph_route_triton` returns, and the rest.
    """
    w = weights
    # The kernels read rows without a stride.
    inputs = (x, w.token_proj, w.features, w.conv, w.self_weight, w.out, w.graph, w.logit_offset)
    inputs = tuple(t if t is None else t.contiguous() for t in inputs)
    eps = -1.0 if w.eps is None else w.eps
    given = (None, None) if matrices is None else (matrices[0].contiguous(), matrices[1].contiguous())
    *routing, passed, low = _GraphRoute.apply(
        *inputs, *given, w.residual, w.act, eps, _graph_normalized(w), top_k, norm_topk_prob
    )
    return tuple(routing), Beside(passed, low)  # pyright: ignore[reportReturnType] - four of them


@torch.no_grad()
def prepare_router(weights: RouterWeights, dtype: torch.dtype) -> PreparedRouter:
    """The token-independent terms of a router for tokens of `dtype`, without gradients; one launch.

    For callers that compute the token projection themselves, see `route_from_projection`.
    """
    w = weights
    none = w.token_proj.new_empty(0, w.token_proj.shape[1], dtype=dtype)
    prepare = operation("graph_route_prepare", launch.prepare, none)
    static, _, conv, self_weight, _ = prepare(
        w.features.contiguous(), w.conv.contiguous(), w.self_weight, w.graph.contiguous(), w.token_proj, none,
        w.residual, w.act, _graph_normalized(w), False, False,
    )  # fmt: skip
    own = None if w.self_weight is None else _rounded_or(self_weight, w.self_weight)
    return PreparedRouter(w, static, _rounded_or(conv, w.conv), own, dtype == torch.float32)


@torch.no_grad()
def route_from_projection(
    z: Tensor, square_sum: Tensor | None, prepared: PreparedRouter, top_k: int, norm_topk_prob: bool = True
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """The part of `graph_route_triton` after the token projection, without gradients; two launches.

    Args:
        z: `x P_x^T`, `[tokens, g]`, float32; may be columns of a wider product.
        square_sum: sum of the squares of each token, `[tokens]`, float32; None where tokens are not normalized.
        prepared: from `prepare_router`.
        top_k: K.
        norm_topk_prob: divide the selected probabilities by their sum.

    Returns:
        As `graph_route_triton`.
    """
    w = prepared.weights
    assert (square_sum is None) == (w.eps is None)
    finish = operation("graph_route_finish", launch.finish, z)
    logits, probs, top_k_weights, top_k_index, _ = finish(
        z, z.new_empty(0) if square_sum is None else square_sum, prepared.static, prepared.conv, prepared.self_weight,
        w.out, w.logit_offset, w.features.shape[0], w.token_proj.shape[1], w.act, w.residual,
        -1.0 if w.eps is None else w.eps, top_k, norm_topk_prob, prepared.precise,
    )  # fmt: skip
    return logits, probs, top_k_weights, top_k_index


def _graph_normalized(weights: RouterWeights) -> bool:
    """Whether the graph is Â. Not a property: PyTorch 2.10 cannot trace one of a named tuple."""
    return weights.graph.shape[0] == weights.features.shape[0] + 1


def _rounded_or(rounded: Tensor, original: Tensor) -> Tensor:
    """The rounded copy, or the original where it needed none."""
    return rounded if rounded.numel() else original


class _GraphRoute(torch.autograd.Function):
    """Joins the raw operations; gradients of logits, probabilities and weights may each be absent."""

    @staticmethod
    def forward(
        ctx: Any,
        x: Tensor,
        token_proj: Tensor,
        features: Tensor,
        conv: Tensor,
        self_weight: Tensor | None,
        out: Tensor,
        graph: Tensor,
        logit_offset: Tensor | None,
        gate_A: Tensor | None,
        up_A: Tensor | None,
        residual: float,
        act: str,
        eps: float,
        graph_normalized: bool,
        top_k: int,
        norm_topk_prob: bool,
    ) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor, Tensor | None]:
        """See `graph_route_beside`."""
        prepare = operation("graph_route_prepare", launch.prepare, x)
        static, proj, conv_rounded, self_rounded, square_sum = prepare(
            features, conv, self_weight, graph, token_proj, x, residual, act, graph_normalized, eps >= 0, True,
            gate_A, up_A,
        )  # fmt: skip
        proj, conv_used = _rounded_or(proj, token_proj), _rounded_or(conv_rounded, conv)
        self_used = None if self_weight is None else _rounded_or(self_rounded, self_weight)
        z = operation("graph_route_project", launch.project, x)(x, proj)
        finish = operation("graph_route_finish", launch.finish, z)
        logits, probs, weights, index, vq = finish(
            z[:, : len(token_proj)], square_sum, static, conv_used, self_used, out, logit_offset, features.shape[0],
            x.shape[1], act, residual, eps, top_k, norm_topk_prob, x.dtype == torch.float32,
        )  # fmt: skip
        ctx.save_for_backward(
            x, proj, features, conv, self_weight, conv_used, self_used, out, graph, z, square_sum, vq, static,
            probs, index,
        )  # fmt: skip
        ctx.settings = (residual, act, eps, norm_topk_prob, graph_normalized)
        ctx.proj_dtypes = [None if t is None else (t.dtype, t.shape) for t in (token_proj, gate_A, up_A)]
        ctx.mark_non_differentiable(index)
        ctx.set_materialize_grads(False)
        return (
            logits,
            probs,
            weights,
            index,
            x.view_as(x),
            None if gate_A is None else z[:, len(token_proj) :],
        )

    @staticmethod
    def backward(ctx: Any, *grad_outputs: Tensor | None) -> tuple[Tensor | None, ...]:
        """Gradients of x and of all weights."""
        grads, (passed, low) = grad_outputs[:3], grad_outputs[4:]
        if low is None and all(grad is None for grad in grads):
            return passed, *(None,) * 15
        wanted = ctx.needs_input_grad
        # Read once: under activation checkpointing every read computes the forward pass again.
        saved = ctx.saved_tensors
        backward = operation("graph_route_backward", launch.backward, saved[0])
        grad_x, grad_proj, grad_features, grad_conv, grad_self, grad_out, grad_graph = backward(
            *grads, passed, low, *saved, *ctx.settings, wanted[6], wanted[0]
        )
        rows = [0 if t is None else t[1][:-1].numel() for t in ctx.proj_dtypes]
        of_proj = [
            None if t is None else share.to(t[0]).view(t[1])
            for t, share in zip(ctx.proj_dtypes, grad_proj.split(rows), strict=True)
        ]
        return (
            grad_x if wanted[0] else None,
            of_proj[0],
            grad_features,
            grad_conv,
            grad_self if wanted[4] else None,
            grad_out,
            grad_graph if wanted[6] else None,
            None,
            *of_proj[1:],
            *(None,) * 6,
        )
