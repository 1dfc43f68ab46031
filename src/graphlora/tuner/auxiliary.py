"""From a routing record to loads and auxiliary losses (paper sections 4.2 and 4.3), once per forward."""

from __future__ import annotations

from collections import defaultdict
from typing import TYPE_CHECKING

import torch
import torch.distributed as dist
from torch import Tensor

from graphlora.errors import GraphLoraError
from graphlora.load import all_ranks_load, batch_load, windowed_load
from graphlora.losses import (
    LOG_EPS,
    edge_density_penalty,
    log_target,
    normal_balance,
    poisson_distinction,
    poisson_target,
)
from graphlora.ops.backend import resolve_backend
from graphlora.router import GraphRouter, Routing
from graphlora.tuner.balance import Entry, balance_losses
from graphlora.tuner.masks import warn_once
from graphlora.tuner.record import RoutingRecord

if TYPE_CHECKING:
    from graphlora.tuner.config import GraphLoraConfig
    from graphlora.tuner.tuner_layer import RoutedLayer

_Sums = tuple["Tensor | None", list[Tensor], list[Tensor]]
_KERNEL_EXPERTS = 64


def auxiliary_loss(
    record: RoutingRecord,
    masks: dict[str, Tensor | None],
    adapter_name: str,
    config: GraphLoraConfig,
    num_samples: int = 1,
) -> Tensor:
    """Weighted sum of the auxiliary losses of one forward; in a training forward, also takes the loads in.

    Over several processes, the mean of the gradients over processes is the gradient of the losses of all their tokens,
    also where they hold unequal numbers of tokens. The losses of the other methods (`balance_losses`) are those of a
    process's own tokens, weighted by their number.

    Args:
        record: routing of every block; in training, its share becomes the mean over all processes.
        masks: flags of the tokens that count, by side (`graphlora.tuner.masks`).
        adapter_name: the active adapter.
        config: its configuration.
        num_samples: rows of the batch.

    Returns:
        Scalar, float32, on the device of the first block: `router_poisson_loss_coef * poisson +
        router_normal_loss_coef * normal` (+ `balance_losses`, + the penalty of learned edges), each a mean over blocks.
        Zero where blocks are offloaded, in evaluation.

    Raises:
        GraphLoraError: in a training forward with offloaded blocks.
    """
    if not record.entries or _is_offloaded(record, adapter_name):
        return torch.zeros(())
    device = record.entries[0][1].router_logits.device
    # Trainers call the model under autocast, where sums written as products would be rounded to half precision.
    with torch.autocast(device.type, enabled=False):
        return _weighted_sum(record, masks, adapter_name, config, num_samples, device)


def _weighted_sum(
    record: RoutingRecord,
    masks: dict[str, Tensor | None],
    adapter_name: str,
    config: GraphLoraConfig,
    num_samples: int,
    device: torch.device,
) -> Tensor:
    entries = [(layer, routing, _mask_for(layer, routing, masks)) for layer, routing in record.entries]
    total = torch.zeros((), device=device)
    sums = _fused_sums if _has_kernel(entries, config, device) else _torch_sums
    poisson, loads, logits = sums(entries, adapter_name, config, device)
    weights = None
    if record.training:
        loads, weights = _sum_over_ranks(record, entries, loads, logits, adapter_name)
    if poisson is not None:
        mean = poisson.mean() if weights is None else (weights * poisson).mean()
        total = total + config.router_poisson_loss_coef * mean
    windowed = []
    # A batch alone is too noisy to report, so the batch window remembers as the ema does.
    kept = "cumulative" if config.load_window == "cumulative" else "ema"
    for (layer, _, _), load in zip(entries, loads, strict=True):
        state = layer.coordination(adapter_name).cumulative_weights
        history = state.to(device)
        windowed.append(windowed_load(history, load, config.load_window, config.load_decay))
        if record.training:
            state.copy_(windowed_load(history, load.detach(), kept, config.load_decay))
    if config.router_normal_loss_coef:
        total = total + config.router_normal_loss_coef * _normal(
            entries, windowed, adapter_name, config, device
        )
    balance = balance_losses(list(_groups(entries).values()), config, num_samples, device)
    total = total + (balance if weights is None else weights.mean() * balance)
    penalties = [p for p in (_edge_penalty(layer, adapter_name) for layer, _, _ in entries) if p is not None]
    if penalties and config.edge_density_loss_coef:
        penalty = torch.stack([p.to(device) for p in penalties]).mean()
        total = total + config.edge_density_loss_coef * penalty
    return total


def _is_offloaded(record: RoutingRecord, adapter_name: str) -> bool:
    """Whether a block's state lies on another medium (CPU or disk offload) between the calls of the block."""
    offloaded = [
        layer.block_name
        for layer, _ in record.entries
        if layer.coordination(adapter_name).poisson_rate_bias.is_meta
    ]
    if offloaded and record.training:
        raise GraphLoraError(
            f"{offloaded[0]} is offloaded, and only runs can be offloaded, not training; "
            "give a device_map that keeps every adapted block on a device."
        )
    return bool(offloaded)


def _mask_for(layer: RoutedLayer, routing: Routing, masks: dict[str, Tensor | None]) -> Tensor | None:
    mask = masks[layer.side]
    tokens = len(routing.router_logits)
    if mask is None:
        return None
    if mask.numel() != tokens:
        warn_once(f"the attention mask has another number of tokens than {layer.block_name} saw")
        return None
    return mask.to(routing.router_logits.device)


def _has_kernel(entries: list[Entry], config: GraphLoraConfig, device: torch.device) -> bool:
    if resolve_backend(config.backend, device.type) != "triton":
        return False
    return all(routing.router_probs.shape[1] <= _KERNEL_EXPERTS for _, routing, _ in entries)


def _torch_sums(
    entries: list[Entry], adapter_name: str, config: GraphLoraConfig, device: torch.device
) -> _Sums:
    """By block: Poisson loss (if it counts), loads, sums of the centered logits with the number of tokens."""
    poisson = _poisson(entries, adapter_name, config, device) if config.router_poisson_loss_coef else None
    loads = [_batch_load(routing, mask, config).to(device) for _, routing, mask in entries]
    logits = [torch.cat([t.to(device) for t in _summed_logits(r, mask)]) for _, r, mask in entries]
    return poisson, loads, logits


def _fused_sums(
    entries: list[Entry], adapter_name: str, config: GraphLoraConfig, device: torch.device
) -> _Sums:
    """As `_torch_sums`, from one kernel per direction for all blocks of equal shape."""
    from graphlora.ops.routing_sums.triton import routing_sums_triton

    per_group: list[Tensor] = []
    found: dict[int, tuple[Tensor, Tensor]] = {}
    absolute = config.divergence != "kl"
    for group in _groups(entries).values():
        rates = torch.stack(
            [layer.coordination(adapter_name).poisson_rate.to(device) for layer, _, _ in group]
        )
        target = poisson_target(rates, group[0][1].router_probs.shape[1])
        columns = zip(
            *((r.router_logits, r.router_probs, r.top_k_weights, r.top_k_index) for _, r, _ in group),
            strict=True,
        )
        logits, probs, weights, index = (torch.stack([t.to(device) for t in column]) for column in columns)
        mask = group[0][2]
        sums = routing_sums_triton(
            logits,
            probs,
            weights,
            index,
            None if mask is None else mask.to(device),
            log_target(target),
            absolute=absolute,
            eps=LOG_EPS,
            count_probs=not config.norm_load_weights,
        )
        per_group.append((target * sums.divergence).sum(dim=-1) / sums.count.clamp_min(1))
        logits_and_count = torch.cat([sums.logits, sums.count[:, None]], dim=1)
        for (_, routing, _), load, logit in zip(group, sums.load, logits_and_count, strict=True):
            found[id(routing)] = load, logit
    loads, logits = zip(*(found[id(routing)] for _, routing, _ in entries), strict=True)
    poisson = _in_order(entries, per_group) if config.router_poisson_loss_coef else None
    return poisson, list(loads), list(logits)


def _poisson(
    entries: list[Entry], adapter_name: str, config: GraphLoraConfig, device: torch.device
) -> Tensor:
    """Mean over the tokens that count, `[blocks]`; blocks of equal shape are taken together."""
    per_group = []
    for group in _groups(entries).values():
        probs = torch.stack([routing.router_probs.to(device) for _, routing, _ in group])
        rates = torch.stack(
            [layer.coordination(adapter_name).poisson_rate.to(device) for layer, _, _ in group]
        )
        per_token = poisson_distinction(probs, rates, config.divergence)
        mask = group[0][2]
        if mask is None:
            per_group.append(per_token.mean(dim=-1) if per_token.shape[-1] else per_token.sum(dim=-1))
        else:
            flags = mask.to(device, per_token.dtype)
            per_group.append((per_token * flags).sum(dim=-1) / flags.sum().clamp_min(1))
    return _in_order(entries, per_group)


def _normal(
    entries: list[Entry],
    loads: list[Tensor],
    adapter_name: str,
    config: GraphLoraConfig,
    device: torch.device,
) -> Tensor:
    """Mean over blocks of the normal balance loss; with `"all_layers"` blocks of equal N share one target."""
    by_size: dict[int, list[tuple[Tensor, Tensor]]] = defaultdict(list)
    for (layer, _, _), load in zip(entries, loads, strict=True):
        by_size[len(load)].append((load, layer.coordination(adapter_name).normal_scale.to(device)))
    per_block = []
    for pairs in by_size.values():
        stacked, scales = (torch.stack(column) for column in zip(*pairs, strict=True))
        across = config.normal_target == "all_layers"
        per_block.append(normal_balance(stacked, scales, config.divergence, across))
    return torch.cat(per_block).mean()


def _batch_load(routing: Routing, mask: Tensor | None, config: GraphLoraConfig) -> Tensor:
    weights = routing.top_k_weights
    if not config.norm_load_weights:
        # The released code adds each token's selected probabilities once per selected expert.
        weights = routing.router_probs.gather(1, routing.top_k_index) * weights.shape[1]
    return batch_load(weights, routing.top_k_index, routing.router_probs.shape[1], mask)


@torch.no_grad()
def _summed_logits(routing: Routing, mask: Tensor | None) -> tuple[Tensor, Tensor]:
    """Sum over the tokens that count of the centered logits, `[num_experts]`, and their number, `[1]`."""
    logits = routing.router_logits
    if mask is None:
        return logits.sum(dim=0), logits.new_full((1,), float(len(logits)))
    flags = mask.to(logits.dtype)
    return flags @ logits, flags.sum()[None]


def _sum_over_ranks(
    record: RoutingRecord,
    entries: list[Entry],
    loads: list[Tensor],
    logits: list[Tensor],
    adapter_name: str,
) -> tuple[list[Tensor], Tensor | None]:
    """Takes in what all processes saw, by the one reduction of a training forward; also centers the routers.

    `logits` are sums of the centered logits with the number of tokens behind them, `[num_experts + 1]` by block.

    Returns:
        The loads summed over all processes, and by which each block's mean over tokens is to be multiplied, `[blocks]`:
        the process's share of all tokens times the number of processes, over which gradients are averaged. None in a
        single process.
    """
    parts = [part for load, logit in zip(loads, logits, strict=True) for part in (load.detach(), logit)]
    sizes = [len(part) for part in parts]
    world_size = dist.get_world_size() if dist.is_available() and dist.is_initialized() else 1
    if world_size > 1:
        share = record.share
        parts.append(
            share.to(parts[0]).reshape(1) if isinstance(share, Tensor) else parts[0].new_full((1,), share)
        )
    summed = torch.cat(parts)
    if world_size > 1:
        dist.all_reduce(summed)
        record.share = summed[-1] / world_size
    pieces = summed[: sum(sizes)].split(sizes)
    total_loads, total_logits = pieces[::2], pieces[1::2]
    for (layer, _, _), total in zip(entries, total_logits, strict=True):
        at_home = total.to(layer.coordination(adapter_name).cumulative_weights.device)
        layer.router(adapter_name).collect(at_home[:-1], at_home[-1])
    if world_size == 1:
        return loads, None
    own, everywhere = (
        torch.stack([part[-1].detach() for part in column]) for column in (logits, total_logits)
    )
    weights = world_size * own / everywhere.clamp_min(1)
    return [all_ranks_load(*pair, world_size) for pair in zip(loads, total_loads, strict=True)], weights


def _edge_penalty(layer: RoutedLayer, adapter_name: str) -> Tensor | None:
    router = layer.router(adapter_name)
    if not isinstance(router, GraphRouter) or router.edge_logits is None:
        return None
    return edge_density_penalty(torch.sigmoid(router.edge_logits.float()), router.edge_density)


def _in_order(entries: list[Entry], per_group: list[Tensor]) -> Tensor:
    """Values of blocks, given by groups, in the order of the entries: `[blocks]`."""
    if len(per_group) == 1:
        return per_group[0]
    grouped = [routing for group in _groups(entries).values() for _, routing, _ in group]
    found = {id(r): value for r, value in zip(grouped, torch.cat(per_group), strict=True)}
    return torch.stack([found[id(routing)] for _, routing, _ in entries])


def _groups(entries: list[Entry]) -> dict[tuple[object, ...], list[Entry]]:
    """Entries that can be stacked: same side, same number of tokens and experts."""
    groups: dict[tuple[object, ...], list[Entry]] = defaultdict(list)
    for entry in entries:
        layer, routing, mask = entry
        groups[(layer.side, mask is None, *routing.router_probs.shape)].append(entry)
    return groups
