"""Log-likelihoods of continuations under any causal language model of transformers, wrapped by PEFT or not.

Contexts are padded on the left, so that what is scored stands at the end: the model computes logits for those
positions alone (`logits_to_keep`). Where the model keeps a plain key-value cache, a context that several
continuations share is read once, and its cache is repeated for them.
"""

from __future__ import annotations

import inspect
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor, nn

from graphlora.errors import GraphLoraError
from graphlora.evaluation.encoding import Unit

Tokens = tuple[int, ...]


class Forward:
    """A model in the form that scoring needs: what its `forward` accepts, where its inputs go."""

    def __init__(self, model: nn.Module) -> None:
        """Look at the model.

        Raises:
            GraphLoraError: An encoder-decoder model.
        """
        unwrap: Any = getattr(model, "get_base_model", None)
        inner: Any = unwrap() if unwrap else model
        if getattr(inner.config, "is_encoder_decoder", False):
            raise GraphLoraError(
                f"{type(inner).__name__} is an encoder-decoder; scoring needs a causal model"
            )
        parameters = inspect.signature(inner.forward).parameters
        self.model = model
        self.device = _device_of_inputs(inner.get_input_embeddings().weight)
        self.window: int | None = getattr(inner.config.get_text_config(), "max_position_embeddings", None)
        self.last_position = (self.window or 1 << 31) - 1
        self.keeps_logits = "logits_to_keep" in parameters
        self.takes_positions = "position_ids" in parameters
        self.takes_cache = "past_key_values" in parameters
        # PEFT's learned prompts drop position ids, and padding would shift the text: no padding for them.
        self.pads = not getattr(getattr(model, "active_peft_config", None), "is_prompt_learning", False)

    def score(self, batch: Sequence[Unit]) -> list[list[float]]:
        """Summed log-likelihood of every continuation of every unit, in natural units (float32)."""
        if not self.pads:
            rows = [replace(unit, continuations=(part,)) for unit in batch for part in unit.continuations]
            return _grouped(torch.tensor([self._alone([row])[0][0] for row in rows]), batch)
        if self.takes_cache and any(len(unit.continuations) > 1 for unit in batch):
            return self._shared(batch)
        return self._alone(batch)

    def last_logits(self, batch: Sequence[Unit]) -> list[list[float]]:
        """Logit of each continuation's only token at the last context position (float32)."""
        logits, _ = self._contexts([unit.context for unit in batch], keep=1)
        return _grouped(_first(logits[:, -1].float(), batch), batch)

    def _alone(self, batch: Sequence[Unit]) -> list[list[float]]:
        """Every continuation with its own copy of the context."""
        rows = [(unit.context, part) for unit in batch for part in unit.continuations]
        logits, _ = self._contexts(
            [context + part[:-1] for context, part in rows], keep=max(len(part) for _, part in rows)
        )
        sums = [_log_likelihood(logits[row, -len(part) :], part) for row, (_, part) in enumerate(rows)]
        return _grouped(torch.stack(sums), batch)

    def _shared(self, batch: Sequence[Unit]) -> list[list[float]]:
        """Every context once; its cache repeated for the continuations' further tokens."""
        rest = max(len(part) for unit in batch for part in unit.continuations) - 1
        logits, cache = self._contexts([unit.context for unit in batch], keep=1, use_cache=rest > 0)
        if rest and not _repeatable(cache):
            self.takes_cache = False
            return self._alone(batch)
        scores = _first(torch.log_softmax(logits[:, -1].float(), dim=-1), batch)
        if rest:
            parts = [(row, part) for row, unit in enumerate(batch) for part in unit.continuations]
            longer = [(place, row, part) for place, (row, part) in enumerate(parts) if len(part) > 1]
            cache.batch_select_indices(torch.tensor([row for _, row, _ in longer], device=self.device))
            rows = [(batch[row].context, part) for _, row, part in longer]
            logits = self._further(rows, max(len(unit.context) for unit in batch), rest, cache)
            further = [_log_likelihood(logits[index], part[1:]) for index, (_, part) in enumerate(rows)]
            places = torch.tensor([place for place, _, _ in longer], device=scores.device)
            scores.index_add_(0, places, torch.stack(further))
        return _grouped(scores, batch)

    def _further(self, rows: Sequence[tuple[Tokens, Tokens]], longest: int, rest: int, cache: Any) -> Tensor:
        """Logits [rows, rest, vocabulary] of continuations after cached contexts padded to `longest`."""
        ids = torch.zeros(len(rows), rest, dtype=torch.long)
        mask = torch.zeros(len(rows), longest + rest, dtype=torch.long)
        positions = torch.zeros(len(rows), rest, dtype=torch.long)
        for row, (context, part) in enumerate(rows):
            ids[row, : len(part) - 1] = torch.tensor(part[:-1])
            mask[row, longest - len(context) : longest + len(part) - 1] = 1
            positions[row] = torch.arange(len(context), len(context) + rest)
        arguments: dict[str, Any] = {"past_key_values": cache, "use_cache": True}
        if self.takes_positions:
            arguments["position_ids"] = positions.clamp(max=self.last_position).to(self.device)
        output = self.model(input_ids=ids.to(self.device), attention_mask=mask.to(self.device), **arguments)
        return output.logits

    def _contexts(self, contexts: Sequence[Tokens], keep: int, use_cache: bool = False) -> tuple[Tensor, Any]:
        """Logits [rows, at least keep, vocabulary] at the end of left-padded texts, and the cache."""
        longest = max(len(context) for context in contexts)
        ids = torch.zeros(len(contexts), longest, dtype=torch.long)
        mask = torch.zeros(len(contexts), longest, dtype=torch.long)
        for row, context in enumerate(contexts):
            ids[row, longest - len(context) :] = torch.tensor(context)
            mask[row, longest - len(context) :] = 1
        arguments: dict[str, Any] = {"attention_mask": mask.to(self.device)}
        if self.takes_positions and not bool(mask.all()):
            arguments["position_ids"] = (mask.cumsum(dim=-1) - 1).clamp(min=0).to(self.device)
        if self.keeps_logits:
            arguments["logits_to_keep"] = keep
        if self.takes_cache:
            arguments["use_cache"] = use_cache
        output = self.model(input_ids=ids.to(self.device), **arguments)
        return output.logits, getattr(output, "past_key_values", None) if use_cache else None


def batches(units: Sequence[Unit], tokens_per_batch: int, pads: bool = True) -> Iterator[list[int]]:
    """Positions of units in batches of similar length, the longest first.

    Args:
        units: What is to be scored.
        tokens_per_batch: Most tokens of a batch, with padding and each continuation's copy of its context; a
            larger unit is a batch of its own.
        pads: Whether units of different length may share a batch.
    """
    order = sorted(range(len(units)), key=lambda position: (-units[position].longest, position))
    batch: list[int] = []
    rows = 0
    for position in order:
        count = len(units[position].continuations)
        width = units[batch[0]].longest if batch else 0
        if batch and ((rows + count) * width > tokens_per_batch or not pads):
            yield batch
            batch, rows = [], 0
        batch.append(position)
        rows += count
    if batch:
        yield batch


@contextmanager
def evaluating(model: nn.Module) -> Iterator[None]:
    """Evaluation mode without gradients; afterwards every module is in the mode it was in."""
    training = [module for module in model.modules() if module.training]
    model.eval()
    try:
        with torch.no_grad():
            yield
    finally:
        for module in training:
            module.training = True


def _device_of_inputs(embeddings: Tensor) -> torch.device:
    """Where the model computes; sharded embeddings may wait elsewhere (offloaded), but know their mesh."""
    mesh = getattr(embeddings, "device_mesh", None)
    return embeddings.device if mesh is None else torch.device(mesh.device_type)


def _first(values: Tensor, batch: Sequence[Unit]) -> Tensor:
    """Values [units, vocabulary] at the first token of every continuation [continuations]."""
    rows = [row for row, unit in enumerate(batch) for _ in unit.continuations]
    tokens = [part[0] for unit in batch for part in unit.continuations]
    return values[torch.tensor(rows, device=values.device), torch.tensor(tokens, device=values.device)]


def _grouped(values: Tensor, batch: Sequence[Unit]) -> list[list[float]]:
    """Values [continuations] as one list per unit."""
    flat = iter(values.tolist())
    return [[next(flat) for _ in unit.continuations] for unit in batch]


def _log_likelihood(logits: Tensor, tokens: Tokens) -> Tensor:
    """Sum of the log-probabilities of `tokens` under the first rows of `logits` [positions, vocabulary]."""
    index = torch.tensor(tokens, device=logits.device)[:, None]
    return torch.log_softmax(logits[: len(tokens)].float(), dim=-1).gather(-1, index).sum()


def _repeatable(cache: Any) -> bool:
    """Whether the cache is keys and values alone, one row per text, which can be repeated row by row."""
    from transformers.cache_utils import DynamicCache, DynamicLayer, DynamicSlidingWindowLayer

    plain = (DynamicLayer, DynamicSlidingWindowLayer)
    return type(cache) is DynamicCache and all(type(layer) in plain for layer in cache.layers)
