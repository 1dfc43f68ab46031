"""The mask of the kernels, in PyTorch."""

from __future__ import annotations

import torch
from torch import Tensor

_BITS = 0xFFFFFFFF


def threshold(p: float) -> int:
    """Hashes below it are dropped."""
    return int(p * 2**32)


def hashed_mask(seed: int, rows: int, columns: int, p: float, first_column: int = 0) -> Tensor:
    """`[rows, columns]`, float32: 0 with probability p, else `1 / (1 - p)`.

    Args:
        seed: non-negative, below 2^31.
        rows: number of tokens.
        columns: number of features.
        p: probability.
        first_column: what the columns are counted from.
    """
    row, column = torch.arange(rows)[:, None], first_column + torch.arange(columns)[None, :]
    x = ((seed + row * 0x9E3779B9) & _BITS) ^ ((column * 0x85EBCA6B) & _BITS)
    x = ((x ^ (x >> 16)) * 0x85EBCA6B) & _BITS
    x = ((x ^ (x >> 13)) * 0xC2B2AE35) & _BITS
    return torch.where(x >= threshold(p), 1 / (1 - p), 0.0).float()
