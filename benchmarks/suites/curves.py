"""The same training curve from every path: 100 steps of a tiny model with `triton`, `torch` and `eager`."""

from __future__ import annotations

from typing import cast

import torch
from peft import get_peft_model
from torch import nn

from benchmarks.candidates.models import graphlora_config, model_config
from benchmarks.context import Context
from benchmarks.shapes import Shape
from graphlora.benchmark.random_model import random_model

CURVE = Shape("curve", "llama", 128, 344, 2, 4, 2, 256)
BATCH, LENGTH = 8, 32
LEARNING_RATE = 5e-4
BACKENDS = ("eager", "torch", "triton")


def measure(context: Context) -> None:
    """Records each path's losses, the largest difference from `eager`'s, and the spread of two seeds of `eager`."""
    p = context.case.params
    dtype = context.dtype
    names = [name for name in BACKENDS if context.may_run(name)]
    curves = {
        name: training_curve(context.stand_in(name), dtype, context.device, p["steps"]) for name in names
    }
    other_seed = training_curve("eager", dtype, context.device, p["steps"], seed=1)
    context.add("eager", "spread", largest_gap(curves["eager"], other_seed), "loss", losses=other_seed)
    for name, losses in curves.items():
        gap = largest_gap(losses, curves["eager"])
        context.add(name, "gap", gap, "loss", losses=losses, dtype=p["dtype"])


def largest_gap(one: list[float], other: list[float]) -> float:
    """Largest difference of two curves, step by step."""
    return max(abs(a - b) for a, b in zip(one, other, strict=True))


def training_curve(
    backend: str,
    dtype: torch.dtype,
    device: torch.device,
    steps: int,
    seed: int = 0,
    lr: float = LEARNING_RATE,
) -> list[float]:
    """Losses of a tiny model that learns sequences with a rule.

    Args:
        backend: path of the adapter.
        dtype: of the frozen weights.
        device: where it runs.
        steps: optimizer steps.
        seed: of the adapter; base and batches are the same for all.
        lr: learning rate.
    """
    base = random_model(model_config(CURVE, CURVE.num_layers), device, dtype)
    torch.manual_seed(seed)
    model = cast(nn.Module, get_peft_model(base, graphlora_config(8, backend))).train()
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=lr)
    generator = torch.Generator().manual_seed(0)
    losses = []
    for _ in range(steps):
        # Each row counts up from a random start by a step of its own: learnable, and never the same batch.
        start, stride = torch.randint(0, 256, (2, BATCH, 1), generator=generator)
        ids = ((start + (1 + stride % 7) * torch.arange(LENGTH)) % 256).to(device)
        loss = model(input_ids=ids, labels=ids).loss
        loss.backward()
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)
        losses.append(loss.detach())
    return torch.stack(losses).double().cpu().tolist()
