"""Batches of few shapes: lengths are rounded up, so that steps can be recorded or compiled once per length."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from torch.nn.functional import pad

SMALLEST_STEP = 32
SMALLEST_POSITIONS = 16


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


def bucket_positions(count: int) -> int:
    """Number of positions that logits are computed at: the next power of two, at least 16."""
    return max(SMALLEST_POSITIONS, 1 << (count - 1).bit_length())


class Bucketed:
    """A collator around another one that pads its batches to few lengths."""

    def __init__(self, collate: Callable[[Any], Any], pad_token_id: int, limit: int | None = None) -> None:
        """Wrap a collator.

        Args:
            collate: The other collator.
            pad_token_id: Token to fill with.
            limit: Longest length that the model takes.
        """
        self.collate, self.limit = collate, limit
        self.fill = {"input_ids": pad_token_id, "attention_mask": 0, "labels": -100}

    def __call__(self, rows: list[dict[str, list[int]]]) -> dict[str, Any]:
        """The other collator's batch, longer."""
        batch = dict(self.collate(rows))
        length = batch["input_ids"].shape[1]
        more = bucket_length(length, self.limit) - length
        return batch | {
            name: pad(batch[name], (0, more), value=v) for name, v in self.fill.items() if name in batch
        }
