"""Expert loads (paper section 4.3): how much routing weight each expert has received."""

from __future__ import annotations

from typing import Literal

import torch
from torch import Tensor

LoadWindow = Literal["cumulative", "ema", "batch"]


def batch_load(weights: Tensor, top_k_index: Tensor, num_experts: int, token_mask: Tensor | None) -> Tensor:
    """Routing weight given to each expert by the tokens of this batch; differentiable in `weights`.

    Args:
        weights: `[tokens, top_k]` weights of the selected experts.
        top_k_index: `[tokens, top_k]` selected experts.
        num_experts: N.
        token_mask: `[tokens]`, true (or 1) where the token counts; None counts all.

    Returns:
        `[num_experts]`, float32, in units of routing weight (one per token when the weights sum to 1).
    """
    weights = weights.float()
    if token_mask is not None:
        weights = weights * token_mask.to(weights.dtype)[:, None]
    # Added up per token first: sums that race for N places would differ in their last bits from run to run on a GPU.
    by_token = weights.new_zeros(len(weights), num_experts).scatter_add(1, top_k_index, weights)
    return by_token.sum(dim=0)


def windowed_load(history: Tensor, batch: Tensor, window: LoadWindow, decay: float) -> Tensor:
    """Activation frequency that the normal balance loss sees.

    Args:
        history: detached loads of earlier training forwards, `[..., num_experts]`.
        batch: loads of this batch, `[..., num_experts]`.
        window: `"cumulative"` adds up since training began (the paper), `"ema"` forgets by `decay` per forward,
            `"batch"` looks at this batch alone.
        decay: share of the history that is kept by `"ema"`.
    """
    if window == "cumulative":
        return history + batch
    if window == "ema":
        return decay * history + (1 - decay) * batch
    return batch


def all_ranks_load(local: Tensor, summed: Tensor, world_size: int) -> Tensor:
    """Value of the load summed over ranks, with the gradient of this rank's part.

    Distributed data parallel averages gradients over ranks, so this rank's part is scaled by `world_size`: the average
    is then the gradient of the loss of the summed load.
    """
    return summed.detach() + world_size * (local - local.detach())


def expert_load(cumulative: Tensor) -> Tensor:
    """Loads as shares that sum to 1 over the experts; uniform where nothing was counted yet."""
    total = cumulative.sum(dim=-1, keepdim=True)
    uniform = torch.full_like(cumulative, 1.0 / cumulative.shape[-1])
    return torch.where(total > 0, cumulative / total.clamp_min(1e-12), uniform)


def normalized_entropy(shares: Tensor) -> Tensor:
    """Entropy of load shares over the last dimension, divided by `log N`: 1 is perfectly even, 0 is one expert."""
    num_experts = shares.shape[-1]
    if num_experts == 1:
        return torch.ones(shares.shape[:-1])
    return -torch.xlogy(shares, shares).sum(dim=-1) / torch.log(torch.tensor(float(num_experts)))
