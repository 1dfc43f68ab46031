"""The sums over tokens in PyTorch."""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor


class RoutingSums(NamedTuple):
    """Sums over the tokens that count, of L blocks of equal shape; all float32.

    Attributes:
        load: routing weight per expert, `[L, N]`; differentiable in the weights, or in the probabilities.
        logits: centered logits, `[L, N]`, without a gradient.
        count: number of tokens, `[L]`.
        divergence: distance of the sorted probabilities from the target's logarithm, by position, `[L, N]`: the target
            times this, summed, is the divergence summed over tokens. Differentiable in both.
    """

    load: Tensor
    logits: Tensor
    count: Tensor
    divergence: Tensor


def routing_sums_torch(
    logits: Tensor,
    probs: Tensor,
    weights: Tensor,
    index: Tensor,
    mask: Tensor | None,
    log_target: Tensor,
    *,
    absolute: bool,
    eps: float,
    count_probs: bool,
) -> RoutingSums:
    """Sums over tokens of L blocks.

    Args:
        logits: `[L, tokens, N]`.
        probs: `[L, tokens, N]`.
        weights: `[L, tokens, K]`.
        index: `[L, tokens, K]`.
        mask: `[tokens]`, true (or 1) where the token counts; None counts all.
        log_target: logarithm of the target, `[L, N]`.
        absolute: distance `|log p - log(q + eps)|` instead of `log p - log max(q, eps)`.
        eps: see `absolute`.
        count_probs: loads count K times the selected probabilities instead of the weights.
    """
    flags = probs.new_ones(probs.shape[1]) if mask is None else mask.to(probs.dtype)
    counted = probs.gather(2, index) * index.shape[2] if count_probs else weights
    # Added up per token first: sums that race for N places would differ in their last bits from run to run on a GPU.
    load = torch.zeros_like(probs).scatter_add(2, index, counted * flags[:, None]).sum(dim=1)
    ordered = probs.sort(dim=-1, descending=True).values
    observed = (ordered + eps).log() if absolute else ordered.clamp_min(eps).log()
    distance = log_target[:, None] - observed
    distance = distance.abs() if absolute else distance
    divergence = (distance * flags[:, None]).sum(dim=1)
    with torch.no_grad():
        sums = (logits * flags[:, None]).sum(dim=1)
    return RoutingSums(load, sums, flags.sum().expand(len(probs)), divergence)
