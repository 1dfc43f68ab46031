"""The one switch between compute paths."""

from __future__ import annotations

import importlib.util
import warnings
from functools import cache
from typing import Literal

from graphlora.errors import GraphLoraError

Backend = Literal["auto", "eager", "torch", "triton"]
BACKENDS: tuple[str, ...] = ("auto", "eager", "torch", "triton")


def resolve_backend(backend: str, device_type: str = "cpu", unsupported: str | None = None) -> str:
    """The path that runs for a configured `backend`.

    `"eager"` loops over the experts and reads like the paper; `"torch"` shares the frozen projections between the
    experts and recomputes what is cheap; `"triton"` does the same in fused kernels; `"auto"` takes
    `"triton"` on the GPUs that it was measured on (Hopper) where it can, else `"torch"`.

    Args:
        backend: the configured name.
        device_type: where the tokens are, such as `"cuda"`.
        unsupported: what the kernels cannot do for this block, as the end of "the Triton kernels do not support ...";
            None where they can do all.

    Raises:
        GraphLoraError: for an unknown name; for `"triton"` without Triton, on a device it does not run on, or for a
            block it does not support.
    """
    if backend not in BACKENDS:
        raise GraphLoraError(f"backend={backend!r} is unknown; choose one of {', '.join(BACKENDS)}.")
    if backend in {"eager", "torch"}:
        return backend
    if backend == "auto" and not _is_measured_gpu(device_type):
        return "torch"
    problem = _triton_problem(device_type)
    if problem is None and unsupported is not None:
        problem = f"the Triton kernels do not support {unsupported}"
        if backend == "auto":
            _warn_once(problem)
    if problem is None:
        return "triton"
    if backend == "triton":
        raise GraphLoraError(f"backend='triton': {problem}; use backend='auto' (the fused PyTorch path).")
    return "torch"


def _is_measured_gpu(device_type: str) -> bool:
    """Whether tile sizes and shared memory were tried on such a GPU: compute capability 9."""
    import torch

    if device_type != "cuda" or not _has_cuda():
        return False
    return _is_hopper(torch.cuda.current_device())


@cache
def _has_cuda() -> bool:
    import torch

    return torch.cuda.is_available() and torch.version.hip is None


@cache
def _is_hopper(device: int) -> bool:
    import torch

    return torch.cuda.get_device_capability(device)[0] == 9


def _triton_problem(device_type: str) -> str | None:
    """Why Triton's kernels cannot run on this device at all, or None."""
    if device_type != "cuda" and not (has_triton() and interprets_triton()):
        return f"its kernels run on CUDA devices, not on {device_type!r}"
    return None if has_triton() else "Triton is not installed (pip install triton)"


@cache
def has_triton() -> bool:
    """Whether Triton can be imported; it comes with PyTorch's CUDA builds."""
    return importlib.util.find_spec("triton") is not None


def interprets_triton() -> bool:
    """Whether Triton runs kernels in its interpreter (`TRITON_INTERPRET=1`), which works on CPU tensors."""
    from triton import knobs

    return bool(knobs.runtime.interpret)


@cache
def _warn_once(problem: str) -> None:
    warnings.warn(f"{problem}; using the fused PyTorch path.", stacklevel=3)
