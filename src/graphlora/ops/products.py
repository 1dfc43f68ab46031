"""Products whose result is wider than their factors."""

from __future__ import annotations

import torch
from torch import Tensor


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
