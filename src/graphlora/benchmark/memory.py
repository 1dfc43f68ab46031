"""Memory that a stretch of work takes: the allocator's count on CUDA, a count of live tensors elsewhere."""

from __future__ import annotations

import weakref
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves


@dataclass
class Memory:
    """Bytes above what was held before; complete once `measure_memory` has ended.

    Attributes:
        peak: the most at any time.
        kept: what is still held at the end.
    """

    peak: int = 0
    kept: int = 0


@contextmanager
def measure_memory(device: torch.device) -> Iterator[Memory]:
    """Measures the tensors' memory of the work inside.

    On CUDA, memory that an operation takes and gives back within itself counts; on other devices only what
    operations return does.

    Args:
        device: device that the work runs on.
    """
    memory = Memory()
    if device.type == "cuda":
        torch.cuda.synchronize(device)
        torch.cuda.reset_peak_memory_stats(device)
        before = torch.cuda.memory_allocated(device)
        yield memory
        torch.cuda.synchronize(device)
        memory.peak = torch.cuda.max_memory_allocated(device) - before
        memory.kept = torch.cuda.memory_allocated(device) - before
        return
    with _LiveStorages() as live:
        yield memory
    memory.peak, memory.kept = live.peak, live.held


class _LiveStorages(TorchDispatchMode):
    """Counts the bytes of storages that operations make, until nobody holds them."""

    def __init__(self) -> None:
        super().__init__()
        self.held = self.peak = 0
        self._known: set[int] = set()

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        del types
        kwargs = kwargs or {}
        # Held while the operation runs, so that no result gets the identity of one of them.
        inputs = [_storage(t) for t in tree_leaves((args, kwargs)) if isinstance(t, torch.Tensor)]
        before = {id(storage) for storage in inputs}
        result = func(*args, **kwargs)
        for tensor in tree_leaves(result):
            if isinstance(tensor, torch.Tensor):
                self._add(tensor, before)
        return result

    def _add(self, tensor: torch.Tensor, before: set[int]) -> None:
        storage = _storage(tensor)
        key = id(storage)
        if key in self._known or key in before:
            return
        size = storage.nbytes()
        self._known.add(key)
        self.held += size
        self.peak = max(self.peak, self.held)
        weakref.finalize(storage, self._forget, key, size)

    def _forget(self, key: int, size: int) -> None:
        self._known.discard(key)
        self.held -= size


def _storage(tensor: torch.Tensor) -> torch.UntypedStorage:
    return tensor.untyped_storage()


@dataclass
class Saved:
    """What autograd keeps for backward; complete once `measure_saved` has ended.

    Attributes:
        num_bytes: of the distinct storages, without those excluded.
        shapes: of the tensors counted, with their dtypes.
    """

    num_bytes: int
    shapes: list[str]


@contextmanager
def measure_saved(excluded: Iterator[torch.Tensor] | list[torch.Tensor]) -> Iterator[Saved]:
    """Counts what the forward inside saves for backward, each storage once and whole.

    Args:
        excluded: tensors whose storages do not count, such as the parameters.
    """
    skip = {tensor.untyped_storage().data_ptr() for tensor in excluded}
    alive: list[torch.Tensor] = []
    saved = Saved(0, [])

    def pack(tensor: torch.Tensor) -> torch.Tensor:
        storage = tensor.untyped_storage()
        if storage.data_ptr() not in skip:
            skip.add(storage.data_ptr())
            alive.append(tensor)
            saved.num_bytes += storage.nbytes()
            saved.shapes.append(f"{list(tensor.shape)} {str(tensor.dtype).removeprefix('torch.')}")
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        yield saved
