"""Routing drawn at random, balanced or skewed."""

from __future__ import annotations

import torch

from graphlora.router import Routing, select_experts

SKEWS = ("balanced", "skewed")


def random_routing(
    tokens: int, num_experts: int, top_k: int, skew: str, device: torch.device, seed: int = 0
) -> Routing:
    """Random routing whose weights want gradients.

    Args:
        tokens: number of tokens.
        num_experts: N.
        top_k: K.
        skew: `"balanced"`: K random experts per token; `"skewed"`: half of the tokens have expert 0 among theirs, the
            others never, so that expert 0 sees half of all tokens.
        device: where the tensors are made.
        seed: of the draw.
    """
    generator = torch.Generator(device).manual_seed(seed)
    logits = torch.randn(tokens, num_experts, device=device, generator=generator)
    if skew == "skewed" and num_experts > 1:
        order = torch.rand(tokens, device=device, generator=generator).argsort()
        logits[:, 0] = torch.where(order < tokens // 2, 8.0, -8.0)
    routing = select_experts(logits, top_k)
    weights = routing.top_k_weights.detach().requires_grad_()
    return Routing(routing.router_logits, routing.router_probs, weights, routing.top_k_index)
