"""Rows joined instead of padded: a batch is one sequence of equal blocks, and attention stays within each row.

A sequence of T tokens would take T^2 of attention and of mask, however short its rows are. So rows are laid into blocks
that are little longer than the longest of them, and attention is computed block by block; everything else sees one
sequence.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn
from transformers import AttentionInterface
from transformers.integrations.sdpa_attention import sdpa_attention_forward
from transformers.masking_utils import AttentionMaskInterface, sdpa_mask

from graphlora.training.bucketing import bucket_length
from graphlora.training.data import IGNORED

# Flags of the tokens that count, [blocks, block length], beside the `position_ids` that separate rows.
TOKEN_MASK = "token_mask"
# Tokens of a block, unless a row is longer: attention is then a small part of a layer's work.
LAUNCHED_BLOCK = 256
# The same where each shape is recorded or compiled: half as many numbers of blocks occur.
FEW_BLOCK = 512
# transformers' name of sdpa attention that takes blocks.
BLOCKED_SDPA = "graphlora_blocked_sdpa"


@dataclass(frozen=True)
class Blocks:
    """How the rows of a batch lie in blocks.

    Attributes:
        rows: Per block, positions of its rows in the batch.
        length: Tokens of each block.
    """

    rows: list[list[int]]
    length: int


Layout = Callable[[Sequence[int]], Blocks]


def one_block(lengths: Sequence[int]) -> Blocks:
    """All rows in one block of few lengths, for attention that cannot take blocks.

    Args:
        lengths: Tokens of each row.
    """
    return Blocks([list(range(len(lengths)))], bucket_length(sum(lengths)))


def few_shapes(lengths: Sequence[int]) -> Blocks:
    """Blocks of a length that nearly all batches share; a batch that fits in one block has one of few lengths.

    Args:
        lengths: Tokens of each row.
    """
    capacity = max(FEW_BLOCK, bucket_length(max(lengths)))
    rows = first_fit(lengths, capacity)
    return Blocks(rows, bucket_length(sum(lengths)) if len(rows) == 1 else capacity)


def little_filling(lengths: Sequence[int], step: int) -> Blocks:
    """As few blocks as rows fit in, all as short as they can be.

    Args:
        lengths: Tokens of each row.
        step: What the blocks' length is a multiple of.
    """
    capacity = max(LAUNCHED_BLOCK, _multiple(max(lengths), step))
    rows = first_fit(lengths, capacity)
    shortest = _multiple(max(max(lengths), -(-sum(lengths) // len(rows))), step)
    for length in range(shortest, capacity, step):
        closer = first_fit(lengths, length)
        if len(closer) <= len(rows):
            return Blocks(closer, length)
    return Blocks(rows, capacity)


def launched(device: torch.device) -> Layout:
    """The layout of steps that are launched one by one.

    On Hopper GPUs PyTorch gives masked attention to cuDNN, which plans each shape that it has not seen, on the host.

    Args:
        device: Where they run.
    """
    return partial(little_filling, step=32 if device.type == "cuda" else 8)


def first_fit(lengths: Sequence[int], capacity: int) -> list[list[int]]:
    """Rows by decreasing length, each in the first block that has room for it.

    Args:
        lengths: Tokens of each row, at most `capacity`.
        capacity: Tokens of a block.

    Returns:
        Per block, positions of its rows in the order of the batch.
    """
    blocks: list[list[int]] = []
    room: list[int] = []
    for row in sorted(range(len(lengths)), key=lambda row: -lengths[row]):
        block = next((b for b, left in enumerate(room) if left >= lengths[row]), len(blocks))
        if block == len(blocks):
            blocks.append([])
            room.append(capacity)
        blocks[block].append(row)
        room[block] -= lengths[row]
    return [sorted(block) for block in blocks]


class BlockCollator:
    """Joins the rows of a batch in one sequence `[1, blocks * length]`.

    Blocks are filled up with a last row without labels, whose tokens do not count: their flags are 0 in `token_mask`
    [blocks, length], from which the trainer makes `packed_attention_mask`.
    """

    def __init__(self, pad_token_id: int, layout: Layout) -> None:
        """Set up.

        Args:
            pad_token_id: Token to fill with.
            layout: How rows of some lengths are laid into blocks.
        """
        self.pad_token_id, self.layout = pad_token_id, layout

    def __call__(self, rows: list[dict[str, list[int]]]) -> dict[str, Tensor]:
        """`input_ids`, `labels` and `position_ids` [1, tokens], and `token_mask` [blocks, length]."""
        blocks = self.layout([len(row["input_ids"]) for row in rows])
        ids: list[int] = []
        labels: list[int] = []
        positions: list[int] = []
        counts: list[list[bool]] = []
        for block in blocks.rows:
            before = len(ids)
            for row in (rows[index] for index in block):
                ids += row["input_ids"]
                # The first token of a row is predicted by nothing.
                labels += [IGNORED, *row["labels"][1:]]
                positions += range(len(row["input_ids"]))
            more = blocks.length - (len(ids) - before)
            counts.append([True] * (blocks.length - more) + [False] * more)
            ids += [self.pad_token_id] * more
            labels += [IGNORED] * more
            positions += range(more)
        return {
            "input_ids": torch.tensor([ids]),
            "labels": torch.tensor([labels]),
            "position_ids": torch.tensor([positions]),
            TOKEN_MASK: torch.tensor(counts),
        }


def packed_attention_mask(position_ids: Tensor, token_mask: Tensor, dtype: torch.dtype | None) -> Tensor:
    """Attention within each row of each block.

    A token that does not count looks at the first token of its block alone, not at itself: that is how it is told from
    the others (docs/masks.md), and a query that sees nothing at all would be undefined.

    Args:
        position_ids: `[1, blocks * length]`, starting anew at 0 with each row.
        token_mask: `[blocks, length]`, false where a token does not count.
        dtype: Dtype of an additive mask (`eager` attention); `None` for flags (`sdpa`).

    Returns:
        `[blocks, 1, length, length]`: true, or 0, where a query (third dimension) sees a key.
    """
    row = (position_ids.view(token_mask.shape) == 0).cumsum(dim=-1)
    at = torch.arange(token_mask.shape[-1], device=position_ids.device)
    sees = (row[:, :, None] == row[:, None, :]) & (at[None, :, None] >= at[None, None, :])
    sees = torch.where(token_mask[:, :, None], sees, at[None, None, :] == 0)[:, None]
    if dtype is None:
        return sees
    return torch.zeros((), dtype=dtype, device=sees.device).masked_fill(~sees, torch.finfo(dtype).min)


def blocked_sdpa(
    module: nn.Module, query: Tensor, key: Tensor, value: Tensor, attention_mask: Tensor | None, **kwargs: Any
) -> tuple[Tensor, None]:
    """The `sdpa` attention of transformers; one sequence with a mask of several blocks is computed block by block.

    Args:
        module: The attention module.
        query: `[batch, heads, queries, width]`.
        key: `[batch, key heads, keys, width]`.
        value: As `key`.
        attention_mask: `None`, `[batch or 1, 1, queries, keys]`, or `[blocks, 1, length, length]`.
        kwargs: Further arguments of transformers' function.

    Returns:
        `[batch, queries, heads, width]` and no weights.
    """
    blocks = 1 if attention_mask is None else attention_mask.shape[0]
    if attention_mask is not None and blocks > 1 and kwargs.get("position_bias") is not None:
        # A bias between all tokens of the sequence, whatever it is made of.
        attention_mask, blocks = torch.block_diag(*attention_mask[:, 0])[None, None].bool(), 1
    if blocks == 1 or query.shape[0] != 1:
        return sdpa_attention_forward(module, query, key, value, attention_mask, **kwargs)
    query, key, value = (t[0].unflatten(1, (blocks, -1)).transpose(0, 1) for t in (query, key, value))
    out, _ = sdpa_attention_forward(module, query, key, value, attention_mask, **kwargs)
    return out.flatten(0, 1)[None], None


AttentionInterface.register(BLOCKED_SDPA, blocked_sdpa)
AttentionMaskInterface.register(BLOCKED_SDPA, sdpa_mask)


def asks_for_sdpa(model: Any) -> bool:
    """Whether a transformers model asks transformers for its attention and masks, by the name `sdpa`.

    Such a one computes attention by blocks (`blocked_attention`) and makes masks without waiting
    (`masks_without_waiting`).
    """
    attention = model.config.get_text_config()._attn_implementation
    return attention == "sdpa" and bool(getattr(model, "_supports_attention_backend", False))


@contextmanager
def blocked_attention(model: Any, on: bool) -> Iterator[None]:
    """Within it, a model that takes blocks computes attention by them.

    Args:
        model: A transformers model.
        on: Whether to; without it, nothing is changed.
    """
    if not on or not asks_for_sdpa(model):
        yield
        return
    config = model.config.get_text_config()
    was = config._attn_implementation
    config._attn_implementation = BLOCKED_SDPA
    try:
        yield
    finally:
        config._attn_implementation = was


def _multiple(length: int, step: int) -> int:
    return -(-length // step) * step
