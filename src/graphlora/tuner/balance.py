"""The auxiliary losses of the other methods, from the routing of a forward (docs/methods.md)."""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from graphlora.experts import dense_mixing
from graphlora.gates import SparsegenRouting
from graphlora.losses import (
    localized_balance,
    selection_balance,
    sparsity_excess,
    switch_balance,
    tsallis_entropy,
    weighted_balance,
)
from graphlora.router import Routing

if TYPE_CHECKING:
    from graphlora.tuner.config import GraphLoraConfig
    from graphlora.tuner.tuner_layer import RoutedLayer

Entry = tuple["RoutedLayer", Routing, "Tensor | None"]
# The methods that add up over their routers; the others take the mean.
_SUMMED = ("mola", "loramoe", "loramoe_paper")


def balance_losses(
    groups: list[list[Entry]], config: GraphLoraConfig, num_samples: int, device: torch.device
) -> Tensor:
    """Weighted sum of load balance, entropy and sparsity losses; zero where all their coefficients are.

    Args:
        groups: layers with their routing and the flags of the tokens that count; equal shapes within a group.
        config: the adapter's configuration.
        num_samples: rows of the batch, for the losses that compare samples.
        device: where the result is wanted.

    Returns:
        Scalar, float32.
    """
    total = torch.zeros((), device=device)
    if config.router_aux_loss_coef:
        form = config.router_aux_loss_form
        if form == "switch_all_layers":
            values = [_over_all_layers(same_size) for same_size in _by_num_experts(groups)]
        else:
            values = [_balance(group, form, num_samples) for group in groups]
        per_router = torch.cat([value.to(device) for value in values])
        balance = per_router.sum() if form in _SUMMED else per_router.mean()
        total = total + config.router_aux_loss_coef * balance
    if config.router_entropy_loss_coef:
        entropy = _token_means(
            groups, lambda r: tsallis_entropy(r.router_probs, config.router_entropy_index), device
        )
        total = total + config.router_entropy_loss_coef * entropy
    if config.router_sparsity_loss_coef:
        excess = _token_means(groups, lambda r: _excess(r, config.top_k), device)
        total = total + config.router_sparsity_loss_coef * excess
    return total


def _balance(group: list[Entry], form: str, num_samples: int) -> Tensor:
    """Loss of each router of a group, `[routers]`."""
    probs, weights, index, mask = _stacked(group)
    if form == "switch":
        return switch_balance(probs, index, mask, weights)
    if form in ("mola", "ld_mole"):
        return selection_balance(probs, index, mask, weights)
    dense = torch.stack([_dense(routing).to(probs.device) for _, routing, _ in group])
    if form == "dynmole":
        return weighted_balance(probs, dense, mask)
    samples = num_samples if dense.shape[1] % num_samples == 0 else 1
    dense = dense.unflatten(1, (samples, -1))
    rows = None if mask is None else mask.unflatten(0, (samples, -1))
    return localized_balance(dense, rows, squared=form == "loramoe")


def _over_all_layers(entries: list[Entry]) -> Tensor:
    """Switch form over the tokens of all layers at once, `[1]`."""
    device = entries[0][1].router_probs.device
    columns = zip(
        *((r.router_probs, r.top_k_weights, r.top_k_index, _flags(r, m)) for _, r, m in entries), strict=True
    )
    probs, weights, index, mask = (torch.cat([t.to(device) for t in column]) for column in columns)
    return switch_balance(probs, index, mask, weights)[None]


def _by_num_experts(groups: list[list[Entry]]) -> list[list[Entry]]:
    sizes: dict[int, list[Entry]] = {}
    for group in groups:
        sizes.setdefault(group[0][1].router_probs.shape[1], []).extend(group)
    return list(sizes.values())


def _token_means(groups: list[list[Entry]], of: Callable[[Routing], Tensor], device: torch.device) -> Tensor:
    """Mean over routers of the mean over the tokens that count of a value per token."""
    means = []
    for group in groups:
        for _, routing, mask in group:
            flags = _flags(routing, mask).float()
            means.append((flags @ of(routing) / flags.sum().clamp_min(1)).to(device))
    return torch.stack(means).mean()


def _excess(routing: Routing, num_selected: int) -> Tensor:
    assert isinstance(routing, SparsegenRouting)
    return sparsity_excess(routing.router_logits, routing.sparsity, num_selected)


def _stacked(group: list[Entry]) -> tuple[Tensor, Tensor, Tensor, Tensor | None]:
    device = group[0][1].router_probs.device
    columns = zip(*((r.router_probs, r.top_k_weights, r.top_k_index) for _, r, _ in group), strict=True)
    probs, weights, index = (torch.stack([t.to(device) for t in column]) for column in columns)
    return probs, weights, index, group[0][2]


def _dense(routing: Routing) -> Tensor:
    return dense_mixing(routing.top_k_weights, routing.top_k_index, routing.router_probs.shape[1])


def _flags(routing: Routing, mask: Tensor | None) -> Tensor:
    probs = routing.router_probs
    return probs.new_ones(len(probs), dtype=torch.bool) if mask is None else mask.to(probs.device) != 0
