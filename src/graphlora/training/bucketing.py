"""Batches of few shapes: lengths are rounded up, so that steps can be recorded or compiled once per length."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from torch.nn.functional import pad

SMALLEST_STEP = 32
SMALLEST_POSITIONS = 16
# Lengths of packed rows whose steps are launched one by one.
PACKED_STEP = 64
# Flags of the tokens that count in a packed row, beside the `position_ids` that separate its documents.
TOKEN_MASK = "token_mask"


def bucket_length(length: int, limit: int | None = None) -> int:
    """Length that a batch is padded to: a multiple of 32, from 256 on of a quarter of the power of two below it.

    Args:
        length: Longest row in tokens, at least 1.
        limit: Longest length that the model takes.

    Returns:
        At most a quarter more than `length` where that is 128 or more, and never over the limit.
    """
    step = max(SMALLEST_STEP, 2 ** ((length - 1).bit_length() - 1) // 4) if length > 1 else SMALLEST_STEP
    bucket = -(-length // step) * step
    return bucket if limit is None else max(length, min(bucket, limit))


def packed_length(length: int) -> int:
    """Length that a packed row is filled up to where nothing is recorded or compiled: the next multiple of 64.

    Joined rows have another length in each batch. On Hopper GPUs PyTorch gives masked attention to cuDNN, which plans
    each length that it has not seen, on the host: about 0.1 s per step, longer than a step of 8 layers takes.
    """
    return -(-length // PACKED_STEP) * PACKED_STEP


def bucket_positions(count: int) -> int:
    """Number of positions that logits are computed at: the next power of two, at least 16."""
    return max(SMALLEST_POSITIONS, 1 << (count - 1).bit_length())


class Bucketed:
    """A collator around another one that pads its batches to few lengths.

    Padded rows get more padding. A packed row gets a last document without labels, whose tokens do not count: their
    flags are 0 in `token_mask` [1, tokens], from which the trainer makes `packed_attention_mask`.
    """

    def __init__(
        self,
        collate: Callable[[Any], Any],
        pad_token_id: int,
        packing: bool,
        round_up: Callable[[int], int] = bucket_length,
    ) -> None:
        """Wrap a collator.

        Args:
            collate: The other collator.
            pad_token_id: Token to fill with.
            packing: Whether its batches are packed.
            round_up: The length that a batch of some length gets.
        """
        self.collate, self.packing, self.round_up = collate, packing, round_up
        self.fill = {"input_ids": pad_token_id, "attention_mask": 0, "labels": -100}

    def __call__(self, rows: list[dict[str, list[int]]]) -> dict[str, Any]:
        """The other collator's batch, longer."""
        batch = dict(self.collate(rows))
        length = batch["input_ids"].shape[1]
        more = self.round_up(length) - length
        padded = {
            name: pad(batch[name], (0, more), value=v) for name, v in self.fill.items() if name in batch
        }
        if self.packing:
            tail = torch.arange(more)[None]
            padded["position_ids"] = torch.cat([batch["position_ids"], tail.to(batch["position_ids"])], dim=1)
            padded[TOKEN_MASK] = pad(torch.ones_like(batch["input_ids"], dtype=torch.bool), (0, more))
        return batch | padded


def packed_attention_mask(position_ids: Tensor, token_mask: Tensor, dtype: torch.dtype | None) -> Tensor:
    """Attention within each document of a packed row.

    A token that does not count looks at the first token alone, not at itself: that is how it is told from the others
    (docs/masks.md), and a row that sees nothing at all would be undefined.

    Args:
        position_ids: `[1, tokens]`, starting anew at 0 with each document.
        token_mask: `[1, tokens]`, false where a token does not count.
        dtype: Dtype of an additive mask (`eager` attention); `None` for flags (`sdpa`).

    Returns:
        `[1, 1, tokens, tokens]`: true, or 0, where a query (third dimension) sees a key.
    """
    document = (position_ids == 0).cumsum(dim=-1)
    at = torch.arange(position_ids.shape[-1], device=position_ids.device)
    sees = (document[:, :, None] == document[:, None, :]) & (at[None, :, None] >= at[None, None, :])
    sees = torch.where(token_mask[:, :, None], sees, at[None, None, :] == 0)[:, None]
    if dtype is None:
        return sees
    return torch.zeros((), dtype=dtype, device=sees.device).masked_fill(~sees, torch.finfo(dtype).min)
