"""Expert FFN and attention LoRA for a few tokens without gradients: static shapes, no sort, no sync, capturable."""

from collections.abc import Callable, Sequence

import torch
from torch import Tensor

from graphlora.ops.decode.beside import run_beside
from graphlora.ops.decode.library import add_low_rank, combine, low_rank, mix, project

__all__ = [
    "add_low_rank",
    "combine",
    "few_tokens",
    "lora_linears_decode",
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


def lora_linears_decode(
    x: Tensor,
    bases: Sequence[Callable[[Tensor], Tensor]],
    lora_As: Sequence[Tensor],
    lora_Bs: Sequence[Tensor],
    scaling: float,
) -> tuple[Tensor, ...]:
    """`W x + s B A x` of one to three frozen layers that read the same few tokens, with all `A x` beside the `W x`.

    Args:
        x: `[..., in]`, see `few_tokens`.
        bases: the frozen layers, whose outputs have one dtype.
        lora_As: `[r, in]` of each.
        lora_Bs: `[out, r]` of each.
        scaling: s = lora_alpha / r, of all.

    Returns:
        `[..., out]` of each in the dtype that the frozen layers give.
    """
    rows = x.reshape(-1, x.shape[-1])
    results, low = run_beside(
        lambda: [base(x) for base in bases], lambda: low_rank(rows, list(lora_As)), x.device
    )
    flat = [result.reshape(-1, result.shape[-1]) for result in results]
    outs = add_low_rank(low, flat, list(lora_Bs), scaling)
    return tuple(out.view(result.shape) for out, result in zip(outs, results, strict=True))
