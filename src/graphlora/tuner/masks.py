"""Which tokens count: the attention mask of a forward, as one flag per token. docs/masks.md has the table."""

from __future__ import annotations

import inspect
import warnings
from functools import cache
from typing import Any

import torch
from torch import Tensor, nn
from transformers.loss.loss_utils import LOSS_MAPPING, ForCausalLMLoss

IGNORE_INDEX = -100


def named_arguments(module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> dict[str, Any]:
    """All arguments of a forward by name; models differ in the order of the positional ones."""
    if not args:
        return kwargs
    return {**dict(zip(inspect.signature(module.forward).parameters, args, strict=False)), **kwargs}


def token_masks(inputs: dict[str, Any], is_encoder_decoder: bool) -> dict[str, Tensor | None]:
    """Flags of the tokens that count, by side.

    Args:
        inputs: the arguments of the model's forward by name (`named_arguments`).
        is_encoder_decoder: whether the model has an encoder and a decoder.

    Returns:
        `{"encoder": ..., "decoder": ...}`, each flattened `[tokens]` or None where every token counts.
    """
    tokens = inputs.get("input_ids") if inputs.get("input_ids") is not None else inputs.get("inputs_embeds")
    own = _flatten(inputs.get("attention_mask"), tokens)
    if not is_encoder_decoder:
        return {"encoder": own, "decoder": own}
    targets = inputs.get("decoder_input_ids")
    targets = targets if targets is not None else inputs.get("decoder_inputs_embeds")
    if inputs.get("decoder_attention_mask") is not None:
        decoder = _flatten(inputs["decoder_attention_mask"], targets)
    elif targets is None and inputs.get("labels") is not None:
        # The decoder reads the labels shifted right. What it reads after the last label predicts nothing, and is not
        # there at all in the longest row, so it must not count in the others.
        decoder = (inputs["labels"] != IGNORE_INDEX).reshape(-1)
    else:
        decoder = None
    return {"encoder": own, "decoder": decoder}


def num_samples(inputs: dict[str, Any]) -> int:
    """Rows of the batch, from the arguments of the model's forward by name."""
    names = ("input_ids", "inputs_embeds", "decoder_input_ids", "decoder_inputs_embeds", "labels")
    return next((len(inputs[name]) for name in names if inputs.get(name) is not None), 1)


def share_of_batch(module: nn.Module, inputs: dict[str, Any], is_encoder_decoder: bool) -> Tensor | float:
    """Share of the optimized batch that this micro-batch is, by its labels; 1 where the trainer does not say.

    Counts labels as transformers' Trainer counts `num_items_in_batch`: a causal language model never predicts the first
    token of a row.
    """
    total = inputs.get("num_items_in_batch")
    labels = inputs.get("shift_labels")
    if labels is None and (labels := inputs.get("labels")) is not None:
        causal = LOSS_MAPPING.get(getattr(module, "loss_type", None) or "") is ForCausalLMLoss
        labels = labels[..., 1:] if causal and not is_encoder_decoder else labels
    if total is None or labels is None:
        return 1.0
    return (labels != IGNORE_INDEX).sum() / total


@cache
def warn_once(what: str) -> None:
    """Warns that padding cannot be told from text; once per process and reason."""
    warnings.warn(
        f"GraphLoRA cannot tell padding from text: {what}. All tokens, padding included, count in the auxiliary losses "
        "and the expert loads; pass a 2-D attention_mask.",
        stacklevel=3,
    )


def every_token(like: Tensor) -> Tensor:
    """The attention mask of a batch in which every token counts: one value in memory, known to `is_every_token`.

    Args:
        like: `[batch, tokens]` of any dtype.
    """
    return torch.ones((), dtype=torch.bool, device=like.device).expand(like.shape)


def is_every_token(mask: Tensor) -> bool:
    """Whether a mask was made by `every_token`; its values are not looked at, for which the host would have to wait."""
    return mask.dim() == 2 and mask.stride() == (0, 0)


def _flatten(mask: Any, tokens: Tensor | None) -> Tensor | None:
    """One flag per query token of a 2-D `[batch, keys]` or 4-D `[batch or 1, heads or 1, queries, keys]` mask."""
    if mask is None or (isinstance(mask, Tensor) and is_every_token(mask)):
        return None
    if isinstance(mask, dict):
        # Models that mix full and sliding attention take one mask per kind; a token sees itself in each of them.
        return _flatten(next((m for m in mask.values() if m is not None), None), tokens)
    if isinstance(mask, Tensor) and mask.dim() == 2:
        # With a key-value cache the mask also covers earlier tokens; the last ones are this forward's.
        return (mask if tokens is None else mask[:, -tokens.shape[1] :]).reshape(-1) != 0
    if isinstance(mask, Tensor) and mask.dim() == 4:
        allowed = _sees_itself(mask)
        # One row may lie in several blocks, each with a mask of its own.
        if tokens is not None and allowed.shape[0] == 1:
            allowed = allowed.expand(tokens.shape[0], -1)
        return allowed.reshape(-1)
    shape = f" with {mask.dim()} dimensions" if isinstance(mask, Tensor) else ""
    warn_once(f"an attention mask of type {type(mask).__name__}{shape} is unknown")
    return None


def _sees_itself(mask: Tensor) -> Tensor:
    """A token of a 4-D mask counts where it may attend to itself; `[batch or 1, queries]`."""
    queries, keys = mask.shape[-2:]
    diagonal = torch.diagonal(mask[:, 0], offset=keys - queries, dim1=-2, dim2=-1)
    if mask.is_floating_point():
        return diagonal == 0
    return diagonal if mask.dtype == torch.bool else diagonal != 0
