"""Batches without padding, known by the host: attention masks are made without asking the device for their values.

transformers leaves out a causal mask that no padding calls for, and looks for padding on the device, which the host
waits for in each step. A collator knows before the batch leaves the host.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import partial
from typing import Any

import torch
from torch import Tensor
from transformers.masking_utils import ALL_MASK_ATTENTION_FUNCTIONS

from graphlora.tuner.masks import is_every_token

_MASK = "attention_mask"
_SDPA = "sdpa"


class NoFullMask:
    """A collator around another one that leaves out the attention mask of a batch without padding."""

    def __init__(self, collate: Callable[[Any], Any]) -> None:
        """Wrap a collator."""
        self.collate = collate

    def __call__(self, rows: Any) -> dict[str, Any]:
        """The other collator's batch."""
        batch = dict(self.collate(rows))
        if _MASK in batch and bool(batch[_MASK].all()):
            del batch[_MASK]
        return batch


@contextmanager
def masks_without_waiting(on: bool = True) -> Iterator[None]:
    """Within it, transformers makes the masks of `sdpa` attention for training without looking at their values.

    A mask is left out if it is that of `every_token`, and made otherwise, also where it turns out to be all ones.

    Args:
        on: Whether to; without it, nothing is changed.
    """
    overridden = ALL_MASK_ATTENTION_FUNCTIONS._local_mapping
    if not on or _SDPA in overridden:
        yield
        return
    ALL_MASK_ATTENTION_FUNCTIONS[_SDPA] = partial(_mask_for_training, ALL_MASK_ATTENTION_FUNCTIONS[_SDPA])
    try:
        yield
    finally:
        del ALL_MASK_ATTENTION_FUNCTIONS[_SDPA]


def _mask_for_training(
    make: Callable[..., Any], *sizes: Any, attention_mask: Tensor | None = None, **options: Any
) -> Any:
    """What `make`, transformers' function, makes; with gradients it never reads `attention_mask` on the host."""
    if attention_mask is not None and torch.is_grad_enabled():
        if is_every_token(attention_mask):
            attention_mask = None
        else:
            options |= {"allow_is_causal_skip": False, "allow_is_bidirectional_skip": False}
    return make(*sizes, attention_mask=attention_mask, **options)
