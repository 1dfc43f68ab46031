"""The two coordination losses of the paper (sections 4.2 and 4.3, equations 6 to 9), as plain functions.

Both compare a sorted target with sorted observations by `divergence`. All inputs and outputs are float32.
"""

from __future__ import annotations

import torch
from torch import Tensor

# Floor of a router probability in a logarithm.
LOG_EPS = 1e-16
_LOAD_EPS = 1e-8
# Targets of 38 experts and more underflow to zero, whose logarithm would make the gradient NaN.
_SMALLEST_TARGET = torch.finfo(torch.float32).tiny


def poisson_target(poisson_rate: Tensor, num_experts: int) -> Tensor:
    """Target of the Poisson distinction loss, eq. 6: `p_i ∝ lambda^i e^-lambda / i!` for i = 1..N, summing to 1.

    Args:
        poisson_rate: lambda, any shape `[...]`, in [1, 2].
        num_experts: N.

    Returns:
        `[..., num_experts]`; not increasing in i, because lambda is at most 2.
    """
    i = torch.arange(1, num_experts + 1, device=poisson_rate.device, dtype=torch.float32)
    log_p = i * poisson_rate.float().log()[..., None] - torch.lgamma(i + 1)
    return log_p.softmax(dim=-1)


def normal_target(normal_scale: Tensor, num_experts: int, across_layers: bool = False) -> Tensor:
    """Target of the normal balance loss, eq. 8: a normal density around N/2, sorted in descending order.

    Args:
        normal_scale: sigma, `[num_layers]`.
        num_experts: N.
        across_layers: the released code's form: one normalization over all layers, so that a layer's target sums to
            about 1 / num_layers. Otherwise every layer's target sums to 1.

    Returns:
        `[num_layers, num_experts]`.
    """
    sigma = normal_scale.float()[:, None]
    i = torch.arange(1, num_experts + 1, device=normal_scale.device, dtype=torch.float32)
    log_density = -((i - num_experts / 2) ** 2) / (2 * sigma**2) - sigma.log()
    logits = log_density.flatten() if across_layers else log_density
    target = logits.softmax(dim=-1).view_as(log_density)
    return target.sort(dim=-1, descending=True).values


def log_target(target: Tensor) -> Tensor:
    """Logarithm of a target, of the same shape; finite also where the target underflows."""
    return target.clamp_min(_SMALLEST_TARGET).log()


def divergence(target: Tensor, observed: Tensor, form: str, eps: float) -> Tensor:
    """Distance of `observed` from `target` over the last dimension.

    Args:
        target: probabilities `[..., N]`.
        observed: probabilities `[..., N]`.
        form: `"kl"` is `sum p log(p / q)` (the paper); `"abs_log_ratio"` is `sum p |log(p / (q + eps))|` (the released
            code).
        eps: floor of `observed` for `"kl"`, added to it for `"abs_log_ratio"`.
    """
    if form == "kl":
        return (target * (log_target(target) - observed.clamp_min(eps).log())).sum(dim=-1)
    floored = target.clamp_min(_SMALLEST_TARGET)
    return (target * (floored / (observed + eps)).log().abs()).sum(dim=-1)


def poisson_distinction(router_probs: Tensor, poisson_rate: Tensor, form: str = "kl") -> Tensor:
    """Per-token Poisson distinction loss, eq. 7: how far the sorted router probabilities are from the target.

    Args:
        router_probs: `[..., tokens, num_experts]`, after the softmax.
        poisson_rate: lambda, `[...]` (one per layer).
        form: see `divergence`.

    Returns:
        `[..., tokens]`; the caller averages over non-padding tokens and layers.
    """
    sorted_probs = router_probs.float().sort(dim=-1, descending=True).values
    target = poisson_target(poisson_rate, router_probs.shape[-1])[..., None, :]
    return divergence(target, sorted_probs, form, LOG_EPS)


def normal_balance(
    loads: Tensor, normal_scale: Tensor, form: str = "kl", across_layers: bool = False
) -> Tensor:
    """Normal balance loss, eq. 9, one value per layer.

    Args:
        loads: non-negative expert loads `[num_layers, num_experts]` in any unit; normalized per layer here.
        normal_scale: sigma, `[num_layers]`.
        form: see `divergence`.
        across_layers: see `normal_target`.

    Returns:
        `[num_layers]`.
    """
    shares = loads.float() / loads.float().sum(dim=-1, keepdim=True).clamp_min(_LOAD_EPS)
    shares = shares.sort(dim=-1, descending=True).values
    target = normal_target(normal_scale, loads.shape[-1], across_layers)
    return divergence(target, shares, form, _LOAD_EPS)


def switch_balance(router_probs: Tensor, top_k_index: Tensor, token_mask: Tensor | None = None) -> Tensor:
    """Load balance loss of the Switch form, `N sum_i F_i P_i`, which MixLoRA and other baselines use.

    F_i is the share of the tokens that select expert i (all top-k choices count), P_i the mean probability of expert i;
    the softmax is applied once. K where the load is even, up to N where all tokens go to the same experts.

    Args:
        router_probs: `[tokens, num_experts]`, after the softmax.
        top_k_index: `[tokens, top_k]`.
        token_mask: `[tokens]`, true (or 1) where the token counts; None counts all.

    Returns:
        Scalar, float32; differentiable in `router_probs` through P alone.
    """
    probs = router_probs.float()
    flags = probs.new_ones(len(probs)) if token_mask is None else token_mask.to(probs.dtype)
    count = flags.sum().clamp_min(1)
    selected = torch.zeros_like(probs).scatter(1, top_k_index, 1.0)
    return probs.shape[1] * ((flags @ selected / count) * (flags @ probs / count)).sum()


def edge_density_penalty(gates: Tensor, edge_density: float) -> Tensor:
    """Squared distance of the mean learned edge gate from `edge_density`; scalar.

    Ours: the paper's graph is static.

    Args:
        gates: `[N (N - 1) / 2]`, values in (0, 1).
        edge_density: the target mean.
    """
    return (gates.float().mean() - edge_density) ** 2 if gates.numel() else gates.new_zeros(())
