"""How the operations of this library are called: on the device of their tensors, by PyTorch's dispatcher if traced."""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any, ParamSpec, TypeVar

import torch
from torch import Tensor
from torch.utils._python_dispatch import is_in_torch_dispatch_mode

P = ParamSpec("P")
Result = TypeVar("Result")
_PLAIN = (Tensor, torch.nn.Parameter)


def is_traced(x: Tensor) -> bool:
    """Whether a compiler, a dispatch mode or the tensor's own class sees what is done with it."""
    return torch.compiler.is_compiling() or is_in_torch_dispatch_mode() or type(x) not in _PLAIN


def operation(name: str, run: Callable[..., Any], x: Tensor) -> Callable[..., Any]:
    """What to call for `torch.ops.graphlora.<name>`: its implementation itself, 11 µs of host time cheaper.

    The registered operation is for compilers, and for modes and tensor classes that see every operation. It has no
    gradient of its own: callers are an `autograd.Function` or run without gradients.

    Args:
        name: of the operation.
        run: its implementation.
        x: one of the tensors that it will be called with.
    """
    if is_traced(x):
        return getattr(torch.ops.graphlora, name).default
    return run


def launches_kernels(run: Callable[P, Result]) -> Callable[P, Result]:
    """Makes the device of the first tensor the current one, where Triton launches.

    A model spread over several GPUs by a `device_map` runs forward with one of them current.
    """

    @functools.wraps(run)
    def on_its_device(*args: P.args, **kwargs: P.kwargs) -> Result:
        device = next(arg.device for arg in args if isinstance(arg, Tensor))
        if device.type != "cuda" or device.index == torch.cuda.current_device():
            return run(*args, **kwargs)
        with torch.cuda.device(device):
            return run(*args, **kwargs)

    return on_its_device
