"""The graph convolution in closed form.

Every token has the same graph, so what does not depend on the token is computed once per forward, and only the N expert
rows of the last layer are computed at all. README.md has the derivation.

Node features are never stored: backward recomputes them, a chunk of tokens at a time.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from graphlora.ops.graph_route.inputs import GraphWeights

Activation = Callable[[Tensor], Tensor]
# Node features of one chunk: 8 M floats are 32 MB, which a CPU's outer cache and any GPU's memory can hold.
_CHUNK_FLOATS = 8 * 2**20


def graph_logits_torch(token: Tensor, weights: GraphWeights, act: Activation) -> Tensor:
    """Same function as `graph_logits_eager` with `conv="gcn"`.

    Args:
        token: token features x', `[tokens, g]`, float32.
        weights: see `GraphWeights`.
        act: the activation.

    Returns:
        `[tokens, N]`.
    """
    if torch.compiler.is_compiling():
        # Dynamo does not trace autograd within a backward; the compiler decides by itself what to recompute.
        return _closed_form(
            token, weights.experts, weights.conv, weights.self_weight, weights.out,
            weights.normalized, weights.residual, act,
        )  # fmt: skip
    return _Recomputed.apply(
        token, weights.experts, weights.conv, weights.self_weight, weights.out,
        weights.normalized, weights.residual, act,
    )  # fmt: skip


def _closed_form(
    token: Tensor,
    experts: Tensor,
    conv: Tensor,
    self_weight: Tensor | None,
    out: Tensor,
    adjacency: Tensor,
    residual: float,
    act: Activation,
) -> Tensor:
    """Logits `[tokens, N]`; features are node-major, `[nodes, tokens, g]`: aggregation is one matrix product."""
    num_experts, width = experts.shape
    num_layers = conv.shape[0]
    mixing = (1 - residual) * adjacency + residual * torch.eye(
        num_experts + 1, device=adjacency.device, dtype=adjacency.dtype
    )
    static = (mixing[:, :num_experts] @ experts) @ conv[0].T
    pre = static[:, None] + mixing[:, num_experts, None, None] * (token @ conv[0].T)
    if self_weight is not None:
        own = experts @ self_weight[0].T
        pre = pre + torch.cat([own[:, None].expand(-1, len(token), -1), (token @ self_weight[0].T)[None]])
    nodes = act(pre)
    for i in range(1, num_layers):
        rows = num_experts if i == num_layers - 1 else num_experts + 1
        spread = (adjacency[:rows] @ nodes.reshape(num_experts + 1, -1)).view(rows, -1, width)
        pre = ((1 - residual) * spread) @ conv[i].T if residual else spread @ conv[i].T
        if residual:
            kept = residual * (experts @ conv[i].T)[:, None]
            if rows > num_experts:
                kept = torch.cat([kept.expand(-1, len(token), -1), residual * (token @ conv[i].T)[None]])
            pre = pre + kept
        if self_weight is not None:
            pre = pre + nodes[:rows] @ self_weight[i].T
        nodes = act(pre)
    return (nodes[:num_experts] @ out).T


class _Recomputed(torch.autograd.Function):
    """Runs `_closed_form` on chunks of tokens and saves its inputs alone."""

    @staticmethod
    def forward(ctx: Any, token: Tensor, *args: Any) -> Tensor:
        tensors, (residual, act) = args[:-2], args[-2:]
        ctx.save_for_backward(token, *tensors)
        ctx.residual, ctx.act = residual, act
        parts = [_closed_form(part, *tensors, residual, act) for part in _chunks(token, tensors[0])]  # pyright: ignore[reportCallIssue]
        return torch.cat(parts)

    @staticmethod
    def backward(ctx: Any, *grad_outputs: Tensor) -> tuple[Tensor | None, ...]:
        token, *tensors = ctx.saved_tensors
        token_grads: list[Tensor] = []
        totals: list[Tensor | None] = [None if t is None else torch.zeros_like(t) for t in tensors]
        for part, grad in zip(_chunks(token, tensors[0]), _chunks(grad_outputs[0], tensors[0]), strict=True):
            leaves: list[Any] = [None if t is None else t.detach().requires_grad_() for t in tensors]
            with torch.enable_grad():
                leaf = part.detach().requires_grad_()
                logits = _closed_form(leaf, *leaves, ctx.residual, ctx.act)  # pyright: ignore[reportCallIssue]
            present = [t for t in (leaf, *leaves) if t is not None]
            grads = iter(torch.autograd.grad(logits, present, grad))
            token_grads.append(next(grads))
            for total in totals:
                if total is not None:
                    total += next(grads)
        return (torch.cat(token_grads), *totals, None, None)


def _chunks(rows: Tensor, experts: Tensor) -> tuple[Tensor, ...]:
    """Token chunks whose node features, `[N + 1, tokens, g]`, hold at most `_CHUNK_FLOATS` numbers."""
    per_token = (experts.shape[0] + 1) * experts.shape[1]
    return rows.split(max(_CHUNK_FLOATS // per_token, 1))
