"""Work that hides behind other work: a parallel branch of a CUDA graph."""

from __future__ import annotations

from collections.abc import Callable
from functools import cache
from typing import TypeVar

import torch

Main = TypeVar("Main")
Side = TypeVar("Side")
# Of the side branch, a property of each node of the graph (PyTorch 2.10 and later): its few blocks go first where those
# of a large product wait for room.
_PRIORITY = -1


def run_beside(main: Callable[[], Main], side: Callable[[], Side], device: torch.device) -> tuple[Main, Side]:
    """Results of both; while a CUDA graph is captured, `side` becomes a branch of it that runs beside `main`.

    Elsewhere `side` runs first, on the same stream: without a graph, launches are what takes time, and a second stream
    would only add to them. Neither may use what the other makes.

    Args:
        main: the longer work.
        side: the work to hide.
        device: where both run.
    """
    if torch.compiler.is_compiling() or device.type != "cuda" or not torch.cuda.is_current_stream_capturing():
        first = side()
        return main(), first
    here, there = torch.cuda.current_stream(device), _side_stream(device)
    there.wait_stream(here)
    with torch.cuda.stream(there):
        beside = side()
    result = main()
    here.wait_stream(there)
    return result, beside


@cache
def _side_stream(device: torch.device) -> torch.cuda.Stream:
    return torch.cuda.Stream(device, priority=_PRIORITY)
