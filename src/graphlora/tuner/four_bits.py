"""4-bit bases of bitsandbytes on a CPU: weights that can be trained through."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

from torch import nn


def keep_differentiable(model: nn.Module) -> None:
    """Keeps bitsandbytes from packing 4-bit weights anew for products that have no gradient.

    On a CPU with AVX-512 and bfloat16, `Linear4bit` does so at its first call in evaluation mode, and what is trained
    afterwards gets no gradient through it, or none that is right. What is packed already is unpacked; its scales stay
    rounded to bfloat16.
    """
    layers: Iterator[Any] = model.modules()
    for layer in layers:
        if getattr(layer, "support_avx512bf16_for_cpu", False):
            layer.support_avx512bf16_for_cpu = False
            state = getattr(getattr(layer, "weight", None), "quant_state", None)
            if getattr(state, "packing_format_for_cpu", False):
                # bitsandbytes unpacks what it hands out.
                layer.state_dict()
