"""One decoding step with a full key-value cache, alone: what a generated token costs."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn
from transformers import StaticCache
from transformers.cache_utils import StaticLayer

from graphlora.errors import GraphLoraError

_WARM_UPS = 3


@dataclass
class DecodeStep:
    """A step that reads one token per row behind a context; every call repeats the same step.

    Attributes:
        model: the model, adapted or not.
        input_ids: the tokens read, `[batch, 1]`; write into them to read others.
        position_ids: their positions, `[batch, 1]`.
        mask: which cached tokens each sees, `[batch, 1, 1, context_length + 1]`.
        cache: keys and values of the context, random numbers.
        logits: of the last call, `[batch, 1, vocabulary]`.
        graph: the captured step, or None where each call runs the model anew.
    """

    model: nn.Module
    input_ids: Tensor
    position_ids: Tensor
    mask: Tensor
    cache: StaticCache
    logits: Tensor = field(init=False)
    graph: torch.cuda.CUDAGraph | None = None

    def __call__(self) -> Tensor:
        """Runs the step; returns `logits`, which the next call overwrites."""
        if self.graph is None:
            self.run()
        else:
            self.graph.replay()
        return self.logits

    @torch.no_grad()
    def run(self) -> None:
        """The step itself; leaves the cache as long as it was, so that it can be repeated."""
        outputs: Any = self.model(
            input_ids=self.input_ids,
            position_ids=self.position_ids,
            attention_mask=self.mask,
            past_key_values=self.cache,
            use_cache=True,
        )
        # One launch for all layers; PyTorch has no public name for it.
        torch._foreach_sub_([layer.cumulative_length for layer in _layers(self.cache)], 1)  # pyright: ignore[reportPrivateImportUsage]
        self.logits = outputs.logits

    def capture(self) -> None:
        """Records the step as a CUDA graph; later calls replay it."""
        device = self.input_ids.device
        stream = torch.cuda.Stream(device)
        stream.wait_stream(torch.cuda.current_stream(device))
        with torch.cuda.stream(stream):
            for _ in range(_WARM_UPS):
                self.run()
        torch.cuda.current_stream(device).wait_stream(stream)
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph, stream=stream):
            self.run()
        self.graph = graph


def decode_step(model: nn.Module, batch: int, context_length: int, seed: int = 0) -> DecodeStep:
    """A decoding step behind a context of random keys and values.

    Args:
        model: a causal language model in evaluation mode, adapted or not.
        batch: rows, each with one new token.
        context_length: cached tokens per row.
        seed: seed of tokens, keys and values.

    Raises:
        GraphLoraError: for a model whose static cache is not one of plain attention layers, such as a sliding window.
    """
    config: Any = model.config
    text_config = config.get_text_config(decoder=True)
    device = next(model.parameters()).device
    cache = StaticCache(config=text_config, max_cache_len=context_length + 1)
    if any(type(layer) is not StaticLayer for layer in cache.layers):
        raise GraphLoraError(
            f"{type(model).__name__} has a cache that is not made of plain attention layers; its decoding step cannot "
            "be measured alone."
        )
    generator = torch.Generator(device).manual_seed(seed)
    ids = torch.randint(text_config.vocab_size, (batch, 1), generator=generator, device=device)
    step = DecodeStep(
        model=model,
        input_ids=ids,
        position_ids=torch.full_like(ids, context_length),
        mask=torch.ones(batch, 1, 1, context_length + 1, dtype=torch.bool, device=device),
        cache=cache,
    )
    # The first run allocates the cache, whose sizes the model knows best.
    step.run()
    for layer in _layers(cache):
        layer.keys.normal_(generator=generator)
        layer.values.normal_(generator=generator)
        layer.cumulative_length.fill_(context_length)
    return step


def captured_decode_step(model: nn.Module, batch: int, context_length: int, seed: int = 0) -> DecodeStep:
    """`decode_step`, recorded as a CUDA graph.

    Args:
        model: see `decode_step`; on a CUDA device.
        batch: see `decode_step`.
        context_length: see `decode_step`.
        seed: see `decode_step`.

    Raises:
        GraphLoraError: see `decode_step`, and for a model elsewhere.
    """
    device = next(model.parameters()).device
    if device.type != "cuda":
        raise GraphLoraError(f"CUDA graphs need a CUDA device; the model is on {device.type!r}.")
    step = decode_step(model, batch, context_length, seed)
    step.capture()
    return step


def _layers(cache: StaticCache) -> list[Any]:
    """The layers as what `decode_step` checked that they are: `StaticLayer`, allocated."""
    return list(cache.layers)
