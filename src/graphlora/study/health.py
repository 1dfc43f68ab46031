"""Routing health of a trained mixture of experts: balance, ties at the boundary, and how alike the experts are."""

from __future__ import annotations

import statistics
from collections import defaultdict
from collections.abc import Sequence
from typing import Any

import torch
from peft import PeftModel
from torch import Tensor

from graphlora.evaluation.forward import evaluating
from graphlora.experts import LoraExperts
from graphlora.training.data import Row

PREFIX, MARK = "base_model.model.", ".graphlora_"
ROWS = 32


def routing_health(model: PeftModel, rows: Sequence[Row]) -> dict[str, dict[str, Any]]:
    """Health by block, low to high layer; empty for adapters without routers.

    Args:
        model: The trained model.
        rows: Token rows that were not trained on; the first of them are read.

    Returns:
        By block name: `expert_load` (shares of the training tokens), `entropy` of the loads (0 to 1), `dead_experts`
        (loads under a tenth of the fair share), `load_cv` (standard deviation of the loads over their mean),
        `tie_rate` (share of the tokens in `rows` whose probabilities, rounded to bfloat16, tie at the top-k boundary;
        `None` where all experts are taken), `validation_load` and `validation_load_cv` (the same loads on `rows`), and
        `expert_overlap` (mean absolute cosine between the experts' updates B A).
    """
    stats = getattr(model.base_model, "routing_stats", None)
    if stats is None:
        return {}
    health = {name: _from_stats(values) for name, values in stats().items()}
    seen = _routing(model, rows[:ROWS])
    overlaps = expert_overlap(model)
    for name, values in health.items():
        if name in seen:
            values |= seen[name]
        values["expert_overlap"] = overlaps.get(name)
    return health


def tie_rate(router_probs: Tensor, top_k: int) -> float | None:
    """Share of the tokens that would choose by position alone once probabilities are rounded to bfloat16.

    Args:
        router_probs: `[tokens, experts]`.
        top_k: Experts that a token takes; with all of them there is no boundary, and the result is `None`.
    """
    if top_k >= router_probs.shape[1]:
        return None
    ordered = router_probs.to(torch.bfloat16).sort(dim=1, descending=True).values
    return float((ordered[:, top_k - 1] == ordered[:, top_k]).float().mean())


def expert_overlap(model: PeftModel) -> dict[str, float]:
    """Mean absolute cosine between the updates of two experts, by block; an update is B A of all its projections.

    `<B_i A_i, B_j A_j> = sum((B_i' B_j) * (A_i A_j'))`, so that no update is ever formed.
    """
    products: dict[str, Tensor] = {}
    for name, module in model.named_modules():
        if isinstance(module, LoraExperts) and len(module.lora_B) > 1:
            block = name.removeprefix(PREFIX).partition(MARK)[0]
            gram = _gram(module.lora_A.detach().double(), module.lora_B.detach().double())
            products[block] = products.get(block, 0) + gram
    found = {}
    for block, gram in products.items():
        norms = gram.diagonal().clamp_min(0).sqrt()
        cosines = gram / (norms[:, None] * norms[None, :]).clamp_min(1e-30)
        upper = torch.triu(torch.ones_like(cosines, dtype=torch.bool), diagonal=1)
        found[block] = float(cosines[upper].abs().mean())
    return found


def load_cv(shares: Sequence[float]) -> float:
    """Standard deviation of the loads over their mean."""
    return statistics.pstdev(shares) / max(statistics.fmean(shares), 1e-12)


def _from_stats(values: dict[str, Any]) -> dict[str, Any]:
    kept = {name: values.get(name) for name in ("expert_load", "entropy", "dead_experts")}
    return kept | {"load_cv": load_cv(values["expert_load"])}


@torch.no_grad()
def _routing(model: PeftModel, rows: Sequence[Row]) -> dict[str, dict[str, Any]]:
    """Ties and loads on rows, read one by one so that no token is padding."""
    tuner: Any = model.base_model
    if not rows:
        return {}
    ties: dict[str, list[float]] = defaultdict(list)
    loads: dict[str, Any] = {}
    tokens = sum(len(row["input_ids"]) for row in rows)
    device = next(model.parameters()).device
    with evaluating(model):
        for row in rows:
            ids = torch.tensor([row["input_ids"]], device=device)
            with tuner.record_routing() as record:
                model(input_ids=ids, attention_mask=torch.ones_like(ids))
            for name, routing in record.items():
                rate = tie_rate(routing.router_probs, routing.top_k_index.shape[1])
                if rate is not None:
                    ties[name].append(rate * ids.shape[1] / tokens)
                load = torch.zeros_like(routing.router_probs[0])
                load.index_add_(
                    0, routing.top_k_index.flatten(), routing.top_k_weights.flatten().to(load.dtype)
                )
                loads[name] = loads.get(name, 0) + load
    shares = {name: (load / load.sum().clamp_min(1e-12)).tolist() for name, load in loads.items()}
    return {
        name: {
            "tie_rate": sum(ties[name]) if name in ties else None,
            "validation_load": part,
            "validation_load_cv": load_cv(part),
        }
        for name, part in shares.items()
    }


def _gram(A: Tensor, B: Tensor) -> Tensor:
    """Inner products between the updates of one projection's experts, `[experts, experts]`."""
    count = len(B)
    A = A.expand(count, *A.shape[1:])
    across_B = torch.einsum("eor,fos->efrs", B, B)
    across_A = torch.einsum("eri,fsi->efrs", A, A)
    return (across_B * across_A).sum(dim=(2, 3))
