"""Products whose result is wider than their factors, or added to another."""

from __future__ import annotations

import torch
from torch import Tensor
from torch.utils._python_dispatch import is_in_torch_dispatch_mode


def product_float32(a: Tensor, b: Tensor, *, widen_factors: bool = False) -> Tensor:
    """`a @ b` in float32, accumulated in float32 on CUDA, where one product can do both.

    Args:
        a: `[m, k]`.
        b: `[k, n]`, in the dtype of `a`.
        widen_factors: On other devices convert the factors first, for accuracy, instead of the result, for speed.
    """
    if a.dtype == torch.float32:
        return a @ b
    if a.device.type == "cuda":
        return torch.mm(a, b, out_dtype=torch.float32)
    return a.float() @ b.float() if widen_factors else (a @ b).float()


def add_product(total: Tensor, a: Tensor, b: Tensor) -> Tensor:
    """`total + a @ b` in one call, into `total`; where something traces, into a tensor of its own.

    For the results of an `autograd.Function`. PyTorch 2.11 compiles one that writes into its result in place into one
    whose result belongs to no gradient (PyTorch's issue 180642): the inputs then train as if they were not used. A
    compiler that is left the choice writes in place by itself. Selective checkpointing, a dispatch mode, refuses what
    it keeps where that is written to later.

    Args:
        total: `[m, n]`, needed no more.
        a: `[m, k]`, in the dtype of `total`.
        b: `[k, n]`, likewise.
    """
    traced = torch.compiler.is_compiling() or is_in_torch_dispatch_mode()
    return torch.addmm(total, a, b) if traced else total.addmm_(a, b)
