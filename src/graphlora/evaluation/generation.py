"""Generation behind a cache of fixed size, which is what transformers compiles."""

from __future__ import annotations

from typing import Any

from torch import Tensor
from transformers import GenerationConfig, StaticCache

# Lengths of a cache are multiples of this, so that few lengths are compiled.
CACHE_STEP = 512


class StaticGenerator:
    """`model.generate` with a static cache that is kept from call to call.

    On a CUDA device transformers compiles the steps behind such a cache and records them as CUDA graphs, which hold
    on to the cache's place in memory; without one it leaves them uncompiled.

    Args:
        model: a causal language model, adapted or not.
    """

    def __init__(self, model: Any) -> None:
        self.model = model
        self._cache: tuple[tuple[int, int], StaticCache] | None = None

    def __call__(self, input_ids: Tensor, generation_config: GenerationConfig, **kwargs: Any) -> Any:
        """What `model.generate` returns.

        Args:
            input_ids: prompts, `[batch, length]`; another batch size is compiled anew.
            generation_config: how to draw tokens; says `max_new_tokens`.
            kwargs: more of `model.generate`, such as `attention_mask`.
        """
        batch, length = input_ids.shape
        cache = self._emptied(batch, length + (generation_config.max_new_tokens or 0))
        return self.model.generate(
            input_ids=input_ids, generation_config=generation_config, past_key_values=cache, **kwargs
        )

    def _emptied(self, batch: int, needed: int) -> StaticCache:
        """An empty cache for so many tokens; the last one where it has the size."""
        size = -(-needed // CACHE_STEP) * CACHE_STEP
        if self._cache is not None and self._cache[0] == (batch, size):
            self._cache[1].reset()
        else:
            config = self.model.config.get_text_config(decoder=True)
            self._cache = (batch, size), StaticCache(config=config, max_cache_len=size)
        return self._cache[1]
