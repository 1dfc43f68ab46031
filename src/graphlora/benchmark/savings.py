"""What a training step takes and what other settings would save, from one small layer: for who is out of memory.

Two short batches through one layer with a small vocabulary give the bytes per token, which are put together as
`graphlora bench` does. So it works where the run itself did not fit.
"""

from __future__ import annotations

import copy
import gc
from dataclasses import dataclass, replace
from typing import Any

import torch
from peft import PeftConfig
from transformers import PretrainedConfig

from graphlora.benchmark.layer import Parts, Setting, memory_parts
from graphlora.benchmark.prediction import peak_bytes

# NF4 with double quantization: 4 bits a weight, and 0.127 bits of constants.
_FOUR_BITS = 4.127 / 8
_TOKENS = (64, 128)
_VOCABULARIES = (256, 512)


@dataclass(frozen=True)
class Run:
    """What decides the memory of a training step.

    Attributes:
        rows: Rows per device and forward pass.
        length: Tokens of the longest row.
        positions: Positions of a row that get logits.
        gradient_checkpointing: Whether layers recompute their activations.
        recompute_gate_up: Whether the FFN's frozen projections are computed again in backward.
        load_in_4bit: Whether the frozen linear layers are kept in 4 bits.
        fused_loss: Whether the loss never holds all logits.
    """

    rows: int
    length: int
    positions: int
    gradient_checkpointing: bool = False
    recompute_gate_up: bool = False
    load_in_4bit: bool = False
    fused_loss: bool = False


class MemoryModel:
    """Predicts the peak of a training step for other settings of a run."""

    def __init__(
        self, config: PretrainedConfig, adapter: PeftConfig, device: torch.device, dtype: torch.dtype
    ) -> None:
        """Measure bytes per token.

        Args:
            config: Architecture of the base.
            adapter: The adapter's config.
            device: Where to measure; a few hundred tokens through one layer must fit.
            dtype: Dtype of the frozen weights.

        Raises:
            torch.OutOfMemoryError: Not even that fits; on a CPU a `RuntimeError` or `MemoryError`.
        """
        self._config, self._adapter, self._device, self._dtype = config, adapter, device, dtype
        self._lines: dict[bool, tuple[Parts, Parts]] = {}
        wide = self._measure(_TOKENS[1], _VOCABULARIES[1], recompute=None)
        narrow = self._measure(_TOKENS[1], _VOCABULARIES[0], recompute=None)
        apart = _TOKENS[1] * (_VOCABULARIES[1] - _VOCABULARIES[0])
        self._per_logit = max(0.0, (wide.rest_peak - narrow.rest_peak) / apart)
        text: Any = config.get_text_config()
        self._layers, self._hidden = int(text.num_hidden_layers), int(text.hidden_size)
        self._vocabulary = int(text.vocab_size)
        copies = 1 if getattr(config, "tie_word_embeddings", False) else 2
        self._rest_weights = copies * self._vocabulary * self._hidden * _itemsize(dtype)

    def peak(self, run: Run) -> int:
        """The most bytes that a step holds, weights included."""
        few, many = self._line(run.recompute_gate_up)
        tokens = run.rows * run.length
        share = (tokens - _TOKENS[0]) / (_TOKENS[1] - _TOKENS[0])

        def at(name: str) -> int:
            low, high = getattr(few, name), getattr(many, name)
            return max(0, round(low + share * (high - low)))

        logits = 0 if run.fused_loss else run.rows * run.positions * self._vocabulary
        parts = replace(
            many,
            activations=at("activations"),
            recomputation=at("recomputation"),
            rest_peak=round(logits * self._per_logit),
            rest_weights=self._rest_weights,
            layer_weights=self._layer_weights(many, run.load_in_4bit),
        )
        inputs = tokens * self._hidden * _itemsize(self._dtype)
        return peak_bytes(
            parts, layers=self._layers, input_bytes=inputs, checkpointing=run.gradient_checkpointing
        ).peak

    def saving(self, run: Run, **changes: Any) -> int:
        """Bytes that the peak is lower with other settings."""
        return self.peak(run) - self.peak(replace(run, **changes))

    def weights(self, four_bits: bool) -> int:
        """Bytes of the frozen weights."""
        return self._layers * self._layer_weights(self._line(False)[1], four_bits) + self._rest_weights

    def _layer_weights(self, parts: Parts, four_bits: bool) -> int:
        return round(parts.layer_weights * (_FOUR_BITS / _itemsize(self._dtype) if four_bits else 1))

    def _line(self, recompute: bool) -> tuple[Parts, Parts]:
        if recompute not in self._lines:
            few, many = (self._measure(tokens, _VOCABULARIES[0], recompute) for tokens in _TOKENS)
            self._lines[recompute] = few, many
        return self._lines[recompute]

    def _measure(self, tokens: int, vocabulary: int, recompute: bool | None) -> Parts:
        config = copy.deepcopy(self._config)
        text: Any = config.get_text_config()
        text.vocab_size = vocabulary
        for name in ("pad_token_id", "bos_token_id", "eos_token_id"):
            setattr(text, name, None)
        adapter = copy.deepcopy(self._adapter)
        if recompute is not None and hasattr(adapter, "recompute_gate_up"):
            adapter.recompute_gate_up = recompute  # pyright: ignore[reportAttributeAccessIssue]  # asked above
        setting = Setting(config, 1, tokens, self._device, self._dtype)
        try:
            return memory_parts(setting, adapter)
        finally:
            gc.collect()


def _itemsize(dtype: torch.dtype) -> int:
    return torch.finfo(dtype).bits // 8
