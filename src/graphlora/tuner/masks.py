"""Which tokens count: the attention mask of a forward, as one flag per token. docs/masks.md has the table."""

from __future__ import annotations

import warnings
from typing import Any

import torch
from torch import Tensor

IGNORE_INDEX = -100


def token_masks(
    args: tuple[Any, ...], kwargs: dict[str, Any], is_encoder_decoder: bool
) -> dict[str, Tensor | None]:
    """Flags of the tokens that count, by side.

    Args:
        args: positional arguments of the model's forward (`input_ids`, `attention_mask`, ...).
        kwargs: its keyword arguments.
        is_encoder_decoder: whether the model has an encoder and a decoder.

    Returns:
        `{"encoder": ..., "decoder": ...}`, each flattened `[tokens]` or None where every token counts.
    """
    attention_mask = kwargs.get("attention_mask", args[1] if len(args) > 1 else None)
    query = _query_length(args, kwargs)
    own = _flatten(attention_mask, query)
    if not is_encoder_decoder:
        return {"encoder": own, "decoder": own}
    decoder_mask = kwargs.get("decoder_attention_mask")
    if decoder_mask is not None:
        decoder = _flatten(decoder_mask, None)
    elif kwargs.get("decoder_input_ids") is None and kwargs.get("labels") is not None:
        decoder = _decoder_mask_from_labels(kwargs["labels"])
    else:
        decoder = None
    return {"encoder": own, "decoder": decoder}


def _query_length(args: tuple[Any, ...], kwargs: dict[str, Any]) -> int | None:
    tokens = kwargs.get("input_ids", args[0] if args else None)
    tokens = tokens if tokens is not None else kwargs.get("inputs_embeds")
    return None if tokens is None else tokens.shape[1]


def _flatten(mask: Any, query: int | None) -> Tensor | None:
    """One flag per query token of a 2-D `[batch, keys]` or 4-D `[batch, 1, queries, keys]` mask."""
    if mask is None:
        return None
    if isinstance(mask, dict):
        # Models that mix full and sliding attention take one mask per kind; each keeps its real tokens' diagonal.
        mask = next((m for m in mask.values() if m is not None), None)
        return _flatten(mask, query)
    if isinstance(mask, Tensor) and mask.dim() == 2:
        # With a key-value cache the mask also covers earlier tokens; the last ones are this forward's.
        return (mask if query is None else mask[:, -query:]).reshape(-1) != 0
    if isinstance(mask, Tensor) and mask.dim() == 4:
        return _diagonal(mask)
    warnings.warn(
        f"GraphLoRA cannot read an attention mask of type {type(mask).__name__}"
        f"{f' with shape {tuple(mask.shape)}' if isinstance(mask, Tensor) else ''}; "
        "all tokens, padding included, count in the auxiliary losses.",
        stacklevel=2,
    )
    return None


def _diagonal(mask: Tensor) -> Tensor:
    """A token of a 4-D mask counts where it may attend to itself."""
    queries, keys = mask.shape[-2:]
    diagonal = torch.diagonal(mask[:, 0], offset=keys - queries, dim1=-2, dim2=-1)
    allowed = (
        diagonal if mask.dtype == torch.bool else diagonal == 0 if mask.is_floating_point() else diagonal != 0
    )
    return allowed.reshape(-1)


def _decoder_mask_from_labels(labels: Tensor) -> Tensor:
    """The decoder's input is the labels shifted right: its first token is real, later ones follow a real label."""
    real = labels != IGNORE_INDEX
    return torch.cat([torch.ones_like(real[:, :1]), real[:, :-1]], dim=1).reshape(-1)
