"""The mask of the kernels, in PyTorch."""

from __future__ import annotations

from typing import TypedDict

import torch
from torch import Tensor

# How far the two columns lie apart that share a hash: what one thread holds of a tile that is loaded as it lies, and of
# one that comes out of a product (of its columns, and of its rows where the tile is transposed).
INPUT_APART, HIDDEN_APART = 1, 8
_BITS = 0xFFFFFFFF


class MaskConstants(TypedDict):
    """Hash halves below the threshold are dropped; the others are multiplied by the inverse of what is kept."""

    THRESHOLD: int
    INVERSE: float


def mask_constants(p: float) -> MaskConstants:
    """For a probability, which is rounded to `1 / 2^16`; the threshold stands in the upper 16 of 32 bits."""
    steps = round(p * 2**16)
    return MaskConstants(THRESHOLD=steps << 16, INVERSE=2**16 / (2**16 - steps))


def hashed_mask(
    seed: int, rows: int, columns: int, p: float, first_column: int = 0, apart: int = INPUT_APART
) -> Tensor:
    """`[rows, columns]`, float32: 0 with probability p, else `1 / (1 - p)`.

    Args:
        seed: non-negative, below 2^31.
        rows: number of tokens.
        columns: number of features.
        p: probability.
        first_column: what the columns are counted from.
        apart: how far two columns with the same hash lie apart, a power of two.
    """
    row, column = torch.arange(rows)[:, None], torch.arange(columns)[None, :]
    x = ((seed + row * 0x9E3779B9) & _BITS) ^ (((first_column + (column & ~apart)) * 0x85EBCA6B) & _BITS)
    x = ((x ^ (x >> 16)) * 0x85EBCA6B) & _BITS
    x = ((x ^ (x >> 13)) * 0xC2B2AE35) & _BITS
    x = x ^ (x >> 16)
    half = torch.where((column & apart) == 0, x, (x << 16) & _BITS)
    constants = mask_constants(p)
    return torch.where(half >= constants["THRESHOLD"], constants["INVERSE"], 0.0).float()
