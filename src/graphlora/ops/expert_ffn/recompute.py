"""Recomputation of the frozen gate and up projections in backward, for memory."""

from __future__ import annotations

from collections.abc import Callable
from typing import TypeVar

import torch
from torch.utils.checkpoint import checkpoint

Result = TypeVar("Result")


def maybe_recompute(recompute: bool, function: Callable[..., Result], *inputs: object) -> Result:
    """`function(*inputs)`; with `recompute`, what it saves for backward is its inputs alone.

    For functions that draw no random numbers. Nests within activation checkpointing and keeps the autocast state;
    Dynamo traces it, and a CUDA graph can capture it.
    """
    if not recompute or not torch.is_grad_enabled():
        return function(*inputs)
    return checkpoint(function, *inputs, use_reentrant=False, preserve_rng_state=False)
