"""From a routing record to loads and auxiliary losses (paper sections 4.2 and 4.3), once per forward."""

from __future__ import annotations

from collections import Counter, defaultdict
from collections.abc import Iterable
from itertools import chain
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
from graphlora.router import GraphRouter, Routing, collect_logits
from graphlora.tuner.balance import Entry, balance_losses
from graphlora.tuner.coordination import Coordination, normal_scales, poisson_rates
from graphlora.tuner.masks import warn_once
from graphlora.tuner.record import RoutingRecord

if TYPE_CHECKING:
    from graphlora.tuner.config import GraphLoraConfig
    from graphlora.tuner.tuner_layer import RoutedLayer

# Of the blocks of a group: Poisson losses `[blocks]` (zero where they do not count), loads `[blocks, num_experts]`, and
# sums of the centered logits with the number of tokens `[blocks, num_experts + 1]`.
_Sums = tuple[Tensor, Tensor, Tensor]
_aten = torch.ops.aten
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
    groups = list(_groups(entries).values())
    total = torch.zeros((), device=device)
    sums = _fused_sums if _has_kernel(entries, config, device) else _torch_sums
    columns = zip(*(sums(group, adapter_name, config, device) for group in groups), strict=True)
    poisson, loads, logits = (_in_order(entries, groups, column) for column in columns)
    weights = None
    if record.training:
        loads, logits, weights = _sum_over_ranks(record, loads, logits)
        _collect(entries, logits, adapter_name)
    if config.router_poisson_loss_coef:
        of_blocks = torch.stack(poisson)
        mean = of_blocks.mean() if weights is None else (weights * of_blocks).mean()
        total = total + config.router_poisson_loss_coef * mean
    windowed = _windowed_loads(entries, loads, adapter_name, config, device, record.training)
    if config.router_normal_loss_coef:
        total = total + config.router_normal_loss_coef * _normal(
            entries, windowed, adapter_name, config, device
        )
    balance = balance_losses(groups, config, num_samples, device)
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
    group: list[Entry], adapter_name: str, config: GraphLoraConfig, device: torch.device
) -> _Sums:
    """Sums over the tokens of the blocks of a group."""
    logits, probs, weights, index = _stacked(group, device)
    mask = _mask_on(group, device)
    poisson = torch.zeros(len(group), device=device)
    if config.router_poisson_loss_coef:
        rates = poisson_rates(_coordinations(group, adapter_name), device)
        poisson = _token_mean(poisson_distinction(probs, rates, config.divergence), mask)
    if not config.norm_load_weights:
        # The released code adds each token's selected probabilities once per selected expert.
        weights = probs.gather(2, index) * index.shape[2]
    load = torch.vmap(batch_load, in_dims=(0, 0, None, None))(weights, index, probs.shape[2], mask)
    return poisson, load, _summed_logits(logits, mask)


def _fused_sums(
    group: list[Entry], adapter_name: str, config: GraphLoraConfig, device: torch.device
) -> _Sums:
    """As `_torch_sums`, from one kernel per direction."""
    from graphlora.ops.routing_sums.triton import routing_sums_triton

    logits, probs, weights, index = _stacked(group, device)
    rates = poisson_rates(_coordinations(group, adapter_name), device)
    target = poisson_target(rates, probs.shape[2])
    sums = routing_sums_triton(
        logits,
        probs,
        weights,
        index,
        _mask_on(group, device),
        log_target(target),
        absolute=config.divergence != "kl",
        eps=LOG_EPS,
        count_probs=not config.norm_load_weights,
    )
    poisson = (target * sums.divergence).sum(dim=-1) / sums.count.clamp_min(1)
    return poisson, sums.load, torch.cat([sums.logits, sums.count[:, None]], dim=1)


def _stacked(group: list[Entry], device: torch.device) -> list[Tensor]:
    """Logits, probabilities, weights and index of a group's blocks, each `[blocks, tokens, ...]`."""
    columns = zip(
        *((r.router_logits, r.router_probs, r.top_k_weights, r.top_k_index) for _, r, _ in group), strict=True
    )
    return [torch.stack([t.to(device) for t in column]) for column in columns]


def _mask_on(group: list[Entry], device: torch.device) -> Tensor | None:
    mask = group[0][2]
    return None if mask is None else mask.to(device)


def _coordinations(entries: list[Entry], adapter_name: str) -> list[Coordination]:
    return [layer.coordination(adapter_name) for layer, _, _ in entries]


def _token_mean(per_token: Tensor, mask: Tensor | None) -> Tensor:
    """Mean over the tokens that count: `[blocks, tokens]` to `[blocks]`."""
    if mask is None:
        return per_token.mean(dim=-1) if per_token.shape[-1] else per_token.sum(dim=-1)
    flags = mask.to(per_token.dtype)
    return (per_token * flags).sum(dim=-1) / flags.sum().clamp_min(1)


@torch.no_grad()
def _summed_logits(logits: Tensor, mask: Tensor | None) -> Tensor:
    """Sums over the tokens that count of the centered logits, and their number: `[blocks, num_experts + 1]`."""
    if mask is None:
        sums, count = logits.sum(dim=1), logits.new_full((), float(logits.shape[1]))
    else:
        flags = mask.to(logits.dtype)
        sums, count = (logits * flags[:, None]).sum(dim=1), flags.sum()
    return torch.cat([sums, count.expand(len(sums), 1)], dim=1)


def _normal(
    entries: list[Entry],
    loads: list[Tensor],
    adapter_name: str,
    config: GraphLoraConfig,
    device: torch.device,
) -> Tensor:
    """Mean over blocks of the normal balance loss; with `"all_layers"` blocks of equal N share one target."""
    by_size: dict[int, list[tuple[Coordination, Tensor]]] = defaultdict(list)
    for pair in zip(_coordinations(entries, adapter_name), loads, strict=True):
        by_size[len(pair[1])].append(pair)
    across = config.normal_target == "all_layers"
    per_block = []
    for pairs in by_size.values():
        stacked = torch.stack([load for _, load in pairs])
        scales = normal_scales([block for block, _ in pairs], device)
        per_block.append(normal_balance(stacked, scales, config.divergence, across))
    return torch.cat(per_block).mean()


def _windowed_loads(
    entries: list[Entry],
    loads: list[Tensor],
    adapter_name: str,
    config: GraphLoraConfig,
    device: torch.device,
    training: bool,
) -> list[Tensor]:
    """Loads that the normal loss sees, by block; in training, the state of the blocks takes them in."""
    # A batch alone is too noisy to report, so the batch window remembers as the ema does.
    kept = "cumulative" if config.load_window == "cumulative" else "ema"
    found: dict[int, Tensor] = {}
    for run in _runs(entries):
        states = [entries[i][0].coordination(adapter_name).cumulative_weights for i in run]
        sizes = [len(state) for state in states]
        history = torch.cat([state.to(device) for state in states])
        load = torch.cat([loads[i] for i in run])
        windowed = windowed_load(history, load, config.load_window, config.load_decay)
        found.update(zip(run, windowed.split(sizes), strict=True))
        if training:
            same = config.load_window == kept
            after = windowed if same else windowed_load(history, load, kept, config.load_decay)
            _aten._foreach_copy_.default(states, list(after.detach().split(sizes)))
    return [found[i] for i in range(len(entries))]


def _collect(entries: list[Entry], logits: list[Tensor], adapter_name: str) -> None:
    for run in _runs(entries):
        collect_logits([entries[i][0].router(adapter_name) for i in run], [logits[i] for i in run])


def _sum_over_ranks(
    record: RoutingRecord, loads: list[Tensor], logits: list[Tensor]
) -> tuple[list[Tensor], list[Tensor], Tensor | None]:
    """Takes in what all processes saw, by the one reduction of a training forward.

    Returns:
        The loads and the sums of the logits with the number of tokens, of all processes; and by which each block's mean
        over tokens is to be multiplied, `[blocks]`: the process's share of all tokens times the number of processes,
        over which gradients are averaged. None in a single process.
    """
    world_size = dist.get_world_size() if dist.is_available() and dist.is_initialized() else 1
    if world_size == 1:
        return loads, logits, None
    load, share = torch.cat(loads), record.share
    share = share.to(load).reshape(1) if isinstance(share, Tensor) else load.new_full((1,), share)
    parts = [load.detach(), torch.cat(logits), share]
    summed = torch.cat(parts)
    dist.all_reduce(summed)
    record.share = summed[-1] / world_size
    all_load, all_logits, _ = summed.split([len(part) for part in parts])
    of_all = all_ranks_load(load, all_load, world_size).split([len(part) for part in loads])
    logits_of_all = all_logits.split([len(part) for part in logits])
    own, everywhere = (torch.stack([part[-1] for part in column]) for column in (logits, logits_of_all))
    return list(of_all), list(logits_of_all), world_size * own / everywhere.clamp_min(1)


def _edge_penalty(layer: RoutedLayer, adapter_name: str) -> Tensor | None:
    router = layer.router(adapter_name)
    if not isinstance(router, GraphRouter) or router.edge_logits is None:
        return None
    return edge_density_penalty(torch.sigmoid(router.edge_logits.float()), router.edge_density)


def _in_order(entries: list[Entry], groups: list[list[Entry]], per_group: Iterable[Tensor]) -> list[Tensor]:
    """Values of blocks, stacked by group, in the order of the entries."""
    grouped = [routing for group in groups for _, routing, _ in group]
    found = {id(r): value for r, value in zip(grouped, chain.from_iterable(per_group), strict=True)}
    return [found[id(routing)] for _, routing, _ in entries]


def _groups(entries: list[Entry]) -> dict[tuple[object, ...], list[Entry]]:
    """Entries that can be stacked: same side, same number of tokens and experts."""
    groups: dict[tuple[object, ...], list[Entry]] = defaultdict(list)
    for entry in entries:
        layer, routing, mask = entry
        groups[(layer.side, mask is None, *routing.router_probs.shape)].append(entry)
    return groups


def _runs(entries: list[Entry]) -> list[list[int]]:
    """Positions of the entries, in the n-th list those of the n-th time that a block ran: no block is twice in one."""
    runs: list[list[int]] = []
    times: Counter[RoutedLayer] = Counter()
    for position, (layer, _, _) in enumerate(entries):
        if times[layer] == len(runs):
            runs.append([])
        runs[times[layer]].append(position)
        times[layer] += 1
    return runs
