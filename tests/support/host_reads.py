"""Which operations of a step wait for the device."""

import torch
from torch.utils._python_dispatch import TorchDispatchMode

# Reading a value, shapes that depend on values, and (lift_fresh) `torch.tensor([...])`.
WAITS = ("_local_scalar_dense", "nonzero", "masked_select", "unique", "bincount", "equal.", "lift_fresh")


class Calls(TorchDispatchMode):
    """Names of all operations."""

    def __init__(self):
        super().__init__()
        self.names = []

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        self.names.append(str(func))
        if any(t.dtype == torch.bool for t in _indices(func, args)):
            self.names.append("nonzero")
        return func(*args, **(kwargs or {}))

    def waits(self):
        return [name for name in self.names if any(w in name for w in WAITS)]


def _indices(func, args):
    is_index = func.overloadpacket in (torch.ops.aten.index, torch.ops.aten.index_put)
    return [t for t in args[1] if t is not None] if is_index else []
