"""Deterministic algorithms for the time of a run."""

from __future__ import annotations

import os
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
import torch._inductor.config

from graphlora.errors import GraphLoraError

# cuBLAS adds in an order of its own unless its workspaces are fixed before it is first used; the attention kernels of
# flash-attn add their gradients with atomics unless told not to.
ENVIRONMENT = {"CUBLAS_WORKSPACE_CONFIG": ":4096:8", "FLASH_ATTENTION_DETERMINISTIC": "1"}

# PyTorch's words.
REFUSED = "does not have a deterministic implementation"


@contextmanager
def deterministic_algorithms(on: bool) -> Iterator[None]:
    """Lets PyTorch use only operations that give the same bits every time, and puts its settings back afterwards.

    Unlike transformers' `full_determinism`, this neither waits for every kernel (`CUDA_LAUNCH_BLOCKING`) nor fills new
    memory with NaN: both cost time, and change no result here.

    Args:
        on: Whether to; without it, nothing is changed.

    Raises:
        GraphLoraError: An operation has no such form; the message names it.
    """
    if not on:
        yield
        return
    was = torch.get_deterministic_debug_mode()
    # A module whose settings are properties, which type checkers do not see.
    memory: Any = torch.utils.deterministic
    fills = memory.fill_uninitialized_memory
    cudnn = torch.backends.cudnn.deterministic, torch.backends.cudnn.benchmark
    environment = {name: os.environ.get(name) for name in ENVIRONMENT}
    # What the user has set stays.
    os.environ.update({name: value for name, value in ENVIRONMENT.items() if environment[name] is None})
    torch.set_deterministic_debug_mode("error")
    memory.fill_uninitialized_memory = False
    torch.backends.cudnn.deterministic, torch.backends.cudnn.benchmark = True, False
    # The compiler then measures no kernels on the device where its choice decides in which order numbers are added.
    compiler: Any = torch._inductor.config
    try:
        with compiler.patch(deterministic=True):
            yield
    except RuntimeError as error:
        if REFUSED not in str(error):
            raise
        operation = str(error).split(REFUSED)[0].strip()
        raise GraphLoraError(
            f"deterministic: {operation} has no deterministic form on this device; leave out --deterministic, or "
            "choose another attn_implementation or backend"
        ) from error
    finally:
        torch.set_deterministic_debug_mode(was)
        memory.fill_uninitialized_memory = fills
        torch.backends.cudnn.deterministic, torch.backends.cudnn.benchmark = cudnn
        for name, value in environment.items():
            if value is None:
                os.environ.pop(name, None)
