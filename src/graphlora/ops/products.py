"""Products whose result is wider than their factors."""

from __future__ import annotations

import torch
from torch import Tensor

_HAS_OUT_DTYPE = tuple(int(part) for part in torch.__version__.split(".")[:2]) >= (2, 8)


def product_float32(a: Tensor, b: Tensor) -> Tensor:
    """`a @ b`, accumulated and returned in float32 where the device can do that in one product."""
    if a.dtype == torch.float32 or a.device.type != "cuda" or not _HAS_OUT_DTYPE:
        return (a @ b).float()
    return torch.mm(a, b, out_dtype=torch.float32)
