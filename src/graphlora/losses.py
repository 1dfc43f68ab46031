"""The two coordination losses of the paper (sections 4.2 and 4.3, equations 6 to 9), as plain functions.

Both compare a sorted target with sorted observations by `divergence`. Below them, the auxiliary losses of the other
methods. All inputs and outputs are float32.
"""

from __future__ import annotations

import torch
from torch import Tensor

# Floor of a router probability in a logarithm.
LOG_EPS = 1e-16
_LOAD_EPS = 1e-8
_VARIATION_EPS = 1e-10
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


def switch_balance(
    router_probs: Tensor,
    top_k_index: Tensor,
    token_mask: Tensor | None = None,
    top_k_weights: Tensor | None = None,
) -> Tensor:
    """Load balance loss of the Switch form, `N sum_i F_i P_i`, which MixLoRA and other baselines use.

    F_i is the share of the tokens that select expert i (all top-k choices count), P_i the mean probability of expert i;
    the softmax is applied once. K where the load is even, up to N where all tokens go to the same experts.

    Args:
        router_probs: `[..., tokens, num_experts]`, after the softmax.
        top_k_index: `[..., tokens, top_k]`.
        token_mask: `[tokens]`, true (or 1) where the token counts; None counts all.
        top_k_weights: `[..., tokens, top_k]`; an expert of weight zero is not selected. None: all in `top_k_index` are.

    Returns:
        `[...]`, float32; differentiable in `router_probs` through P alone.
    """
    share, prob = _selected_and_probable(router_probs, top_k_index, token_mask, top_k_weights)
    return router_probs.shape[-1] * (share * prob).sum(dim=-1)


def selection_balance(
    router_probs: Tensor,
    top_k_index: Tensor,
    token_mask: Tensor | None = None,
    top_k_weights: Tensor | None = None,
) -> Tensor:
    """Load balance loss of MoLA and LD-MoLE, `N sum_i f_i P_i`, f_i the share of all selections (sum 1), not of tokens.

    1 where the load is even, whatever K. Arguments and result as in `switch_balance`. Sources: MoLA (arXiv 2402.08562),
    LD-MoLE (arXiv 2509.25684), whose selections are the experts of nonzero weight.
    """
    share, prob = _selected_and_probable(router_probs, top_k_index, token_mask, top_k_weights)
    share = share / share.sum(dim=-1, keepdim=True).clamp_min(_LOAD_EPS)
    return router_probs.shape[-1] * (share * prob).sum(dim=-1)


def weighted_balance(router_probs: Tensor, weights: Tensor, token_mask: Tensor | None = None) -> Tensor:
    """DynMoLE's load balance loss, `N sum_e mean(w_e) mean(pi_e)` over tokens (arXiv 2504.00661).

    Args:
        router_probs: pi, `[..., tokens, num_experts]`, after the softmax.
        weights: w, the same shape: pi where an expert is selected, else zero.
        token_mask: `[tokens]`, true (or 1) where the token counts; None counts all.

    Returns:
        `[...]`, float32; differentiable in both.
    """
    weight, prob = _token_mean(weights, token_mask), _token_mean(router_probs, token_mask)
    return router_probs.shape[-1] * (weight * prob).sum(dim=-1)


def tsallis_entropy(router_probs: Tensor, index: float) -> Tensor:
    """Tsallis entropy `S_q = (1 - sum_i pi_i^q) / (q - 1)` of each token's routing; DynMoLE (arXiv 2504.00661).

    Zero where one expert has all, `(1 - N^(1 - q)) / (q - 1)` where all are equal; Shannon's entropy as q goes to 1.

    Args:
        router_probs: pi, `[..., num_experts]`.
        index: q, above 1.

    Returns:
        `[...]`, float32.
    """
    return (1 - router_probs.float().pow(index).sum(dim=-1)) / (index - 1)


def localized_balance(
    weights: Tensor,
    token_mask: Tensor | None = None,
    same_type: Tensor | None = None,
    delta: float = 0.0,
    squared: bool = True,
) -> Tensor:
    """LoRAMoE's localized balancing constraint (arXiv 2312.09979): how unevenly experts are used, within their groups.

    `Q[m, n] = sum_t w[m, t, n]`; `I[m, n] = 1 + delta` where expert n's group is sample m's type, else `1 - delta`;
    `Z = I * Q`; the loss is `var(Z) / mean(Z)^2` over samples and experts (its code) or `var(Z) / mean(Z)` (the paper),
    with the variance of a sample, as in the code. Without types this is plain balance.

    Args:
        weights: w, `[..., samples, tokens, num_experts]`.
        token_mask: `[samples, tokens]`, true (or 1) where the token counts; None counts all.
        same_type: `[samples, num_experts]`, true where the expert's group is the sample's type; None: no types.
        delta: how much more an expert should do on its own type; without types it has no effect.
        squared: the form of the code, else the paper's.

    Returns:
        `[...]`, float32; zero where there is a single sample with a single expert.
    """
    weights = weights.float()
    if token_mask is not None:
        weights = weights * token_mask.to(weights.dtype)[..., None]
    z = weights.sum(dim=-2)
    if same_type is not None:
        z = z * torch.where(same_type, 1 + delta, 1 - delta)
    z = z.flatten(-2)
    if z.shape[-1] == 1:
        return z.new_zeros(z.shape[:-1])
    mean = z.mean(dim=-1)
    return z.var(dim=-1) / ((mean.square() if squared else mean) + _VARIATION_EPS)


def sparsity_excess(router_logits: Tensor, sparsity: Tensor, num_selected: int) -> Tensor:
    """LD-MoLE's sparsity loss of each token, `relu(lower_k - lam)` (arXiv 2509.25684).

    At most k experts are active where `lam >= lower_k = 1 - sum_{j <= k} (u_(j) - u_(k + 1))`, u_(j) the j-th largest
    logit. The logits are not trained by it.

    Args:
        router_logits: u, `[..., num_experts]`.
        sparsity: lam, `[...]`, below 1.
        num_selected: k.

    Returns:
        `[...]`, float32; zero where k is the number of experts or more.
    """
    if num_selected >= router_logits.shape[-1]:
        return torch.zeros_like(sparsity, dtype=torch.float32)
    u = router_logits.detach().float().sort(dim=-1, descending=True).values
    lower = 1 - (u[..., :num_selected] - u[..., num_selected, None]).sum(dim=-1)
    return (lower - sparsity.float()).relu()


def _selected_and_probable(
    router_probs: Tensor, top_k_index: Tensor, token_mask: Tensor | None, top_k_weights: Tensor | None
) -> tuple[Tensor, Tensor]:
    """Share of the tokens that select each expert, and its mean probability; both `[..., num_experts]`."""
    chosen: Tensor | float = 1.0 if top_k_weights is None else (top_k_weights > 0).float()
    selected = torch.zeros_like(router_probs, dtype=torch.float32).scatter(-1, top_k_index, chosen)
    return _token_mean(selected, token_mask), _token_mean(router_probs, token_mask)


def _token_mean(values: Tensor, token_mask: Tensor | None) -> Tensor:
    """Mean over the tokens that count: `[..., tokens, num_experts]` to `[..., num_experts]`."""
    values = values.float()
    flags = values.new_ones(values.shape[-2]) if token_mask is None else token_mask.to(values.dtype)
    return flags @ values / flags.sum().clamp_min(1)


def edge_density_penalty(gates: Tensor, edge_density: float) -> Tensor:
    """Squared distance of the mean learned edge gate from `edge_density`; scalar.

    Ours: the paper's graph is static.

    Args:
        gates: `[N (N - 1) / 2]`, values in (0, 1).
        edge_density: the target mean.
    """
    return (gates.float().mean() - edge_density) ** 2 if gates.numel() else gates.new_zeros(())
