"""Expert FFN and attention LoRA for a few tokens without gradients: static shapes, no sort, no sync, capturable."""

from collections.abc import Callable

import torch
from torch import Tensor

from graphlora.ops.decode.beside import run_beside
from graphlora.ops.decode.library import add_low_rank, combine, low_rank, mix, project

__all__ = [
    "add_low_rank",
    "combine",
    "few_tokens",
    "lora_linear_decode",
    "low_rank",
    "mix",
    "project",
    "run_beside",
]

MAX_TOKENS = 64
_DTYPES = (torch.float32, torch.bfloat16, torch.float16)


def few_tokens(x: Tensor) -> bool:
    """Whether a forward of `x`, `[..., d]`, may take this path: at most 64 tokens, no gradients, no autocast."""
    if torch.is_grad_enabled() or x.dtype not in _DTYPES or torch.is_autocast_enabled(x.device.type):
        return False
    return 0 < x.shape[:-1].numel() <= MAX_TOKENS


def lora_linear_decode(
    x: Tensor, base: Callable[[Tensor], Tensor], lora_A: Tensor, lora_B: Tensor, scaling: float
) -> Tensor:
    """`W x + s B A x` for a few tokens, with `A x` beside `W x`.

    Args:
        x: `[..., in]`, see `few_tokens`.
        base: the frozen layer.
        lora_A: `[r, in]`.
        lora_B: `[out, r]`.
        scaling: s = lora_alpha / r.

    Returns:
        `[..., out]` in the dtype that the frozen layer gives.
    """
    rows = x.reshape(-1, x.shape[-1])
    result, low = run_beside(lambda: base(x), lambda: low_rank(rows, lora_A), x.device)
    out = add_low_rank(result.reshape(-1, result.shape[-1]), low, lora_B, scaling)
    return out.view(result.shape)
