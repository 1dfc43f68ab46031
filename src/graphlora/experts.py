"""LoRA experts (paper eqs. 1 and 2): the stacked low-rank pairs of one projection."""

from __future__ import annotations

import math

import torch
from torch import Tensor, nn


class LoraExperts(nn.Module):
    """One (A, B) pair per expert, stacked: `lora_A` is `[num_experts, r, in]`, `lora_B` is `[num_experts, out, r]`.

    A starts Kaiming uniform (a = sqrt 5) and B at zero, so that a new adapter changes nothing.

    Args:
        num_experts: N.
        in_features: input size of the projection.
        out_features: output size of the projection.
        r: rank.
        shared_A: all experts share one A, so that `lora_A` is `[1, r, in]` (HydraLoRA, arXiv 2404.19245).
    """

    def __init__(
        self, num_experts: int, in_features: int, out_features: int, r: int, shared_A: bool = False
    ) -> None:
        super().__init__()
        self.lora_A = nn.Parameter(torch.empty(1 if shared_A else num_experts, r, in_features))
        self.lora_B = nn.Parameter(torch.zeros(num_experts, out_features, r))
        bound = math.sqrt(6 / ((1 + 5) * in_features))
        nn.init.uniform_(self.lora_A, -bound, bound)

    def forward(self) -> tuple[Tensor, Tensor]:
        """`(lora_A, lora_B)`; a call, so that hooks which keep weights elsewhere (offloading) bring them in."""
        return self.lora_A, self.lora_B


def mixed_lora_delta(x: Tensor, lora_A: Tensor, lora_B: Tensor, mixing: Tensor, scaling: float) -> Tensor:
    """`s sum_e w_e B_e A_e x` of one projection (paper eq. 3, `"linear"` granularity), all experts in two products.

    Args:
        x: `[tokens, in]`.
        lora_A: `[num_experts, r, in]`, or `[1, r, in]` for one A that all experts share.
        lora_B: `[num_experts, out, r]`.
        mixing: routing weights, zero for experts not selected, `[tokens, num_experts]`.
        scaling: s = lora_alpha / r.

    Returns:
        `[tokens, out]`.
    """
    low = (x @ lora_A.flatten(0, 1).T).unflatten(1, lora_A.shape[:2])
    low = low * (scaling * mixing).to(low.dtype)[:, :, None]
    return low.flatten(1) @ lora_B.transpose(1, 2).flatten(0, 1)


def lora_delta_loop(x: Tensor, lora_A: Tensor, lora_B: Tensor, mixing: Tensor, scaling: float) -> Tensor:
    """Same function as `mixed_lora_delta`, one expert after the other."""
    delta = x.new_zeros(len(x), lora_B.shape[1])
    own_A = lora_A.expand(len(lora_B), *lora_A.shape[1:])
    for A, B, weight in zip(own_A, lora_B, mixing.unbind(dim=1), strict=True):
        delta = delta + (scaling * weight)[:, None].to(x.dtype) * ((x @ A.T) @ B.T)
    return delta


def dense_mixing(top_k_weights: Tensor, top_k_index: Tensor, num_experts: int) -> Tensor:
    """Routing weights as a dense `[tokens, num_experts]` matrix, zero for experts not selected."""
    mixing = top_k_weights.new_zeros(len(top_k_weights), num_experts)
    return mixing.scatter(1, top_k_index, top_k_weights)
