"""Frozen linear layers with one low-rank pair each: `W x + s B A x`, in as few calls as there are matrix products.

The pair's weights may be float32 beside a half-precision layer. Both are cast by one call, every product runs in the
dtype of the layer, and those that give gradients of float32 weights give float32. Beside the frozen layer this takes 1
cast and 2 products forward, 4 products backward: the scaling is a factor of a product, and where the layer is a plain
matrix, both sums (of the outputs, and of the two gradients of x) are accumulated by the second product in place.
First-order gradients only.

Layers that read one x share what reads or writes x: one product gives `A x` of all pairs, one the gradients of all A,
and the gradients of x are summed by the products themselves, in place.

With `dropout`, on devices where Triton runs, the input of A is dropped out: a copy that is made again in backward
instead of being kept, and a mask in the product that gives x its gradient.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from graphlora.ops.products import product_float32, sum_of_products


class AdaptedMatrix(NamedTuple):
    """A plain frozen matrix and its low-rank pair.

    Attributes:
        weight: `[out, in]`.
        bias: `[out]` or None.
        lora_A: `[r, in]`.
        lora_B: `[out, r]`.
    """

    weight: Tensor
    bias: Tensor | None
    lora_A: Tensor
    lora_B: Tensor


def add_low_rank(
    result: Tensor, x: Tensor, lora_A: Tensor, lora_B: Tensor, scaling: float, dropout: float = 0.0
) -> Tensor:
    """`result + s B A x`, for any frozen layer (quantized, sharded, offloaded) that gave `result`.

    Args:
        result: `[..., out]`, floating point; decides the dtype of the products.
        x: `[..., in]`.
        lora_A: `[r, in]`.
        lora_B: `[out, r]`.
        scaling: s = lora_alpha / r.
        dropout: probability of dropping entries of the x that A sees; needs Triton.

    Returns:
        `[..., out]` in the dtype of `result`.
    """
    seed = _seed(x, dropout)
    if not torch.is_autocast_enabled(result.device.type):
        return _AddLowRank.apply(result, x.to(result.dtype), lora_A, lora_B, scaling, dropout, seed)
    with torch.autocast(result.device.type, enabled=False):
        return _AddLowRank.apply(result, x.to(result.dtype), lora_A, lora_B, scaling, dropout, seed)


def lora_linears(
    x: Tensor, matrices: Sequence[AdaptedMatrix], scaling: float, dropout: float = 0.0
) -> tuple[Tensor, ...]:
    """`W x + b + s B A x` for plain frozen matrices that read the same x; no gradients for weights and biases.

    Args:
        x: `[..., in]`.
        matrices: the matrices, their pairs in one dtype.
        scaling: s = lora_alpha / r, of all.
        dropout: probability of dropping entries of the x that every A sees, the same for all; needs Triton.

    Returns:
        `[..., out]` of each, in the dtype of `x`.
    """
    flat = [tensor for matrix in matrices for tensor in matrix]
    return _LoraLinear.apply(x, scaling, dropout, _seed(x, dropout), *flat)


def plain_matrix(layer: nn.Module, x: Tensor) -> tuple[Tensor, Tensor | None] | None:
    """`(weight, bias)` where calling the frozen layer on `x` is the product with them and nothing else; else None.

    None for quantized and sharded weights, trained ones, hooks, a replaced `forward`, autocast and mixed dtypes.
    """
    if type(layer) is not nn.Linear or "forward" in layer.__dict__:
        return None
    weight, bias = layer.weight, layer.bias
    if type(weight) is not nn.Parameter or weight.requires_grad or weight.dtype != x.dtype:
        return None
    if bias is not None and (bias.requires_grad or bias.dtype != x.dtype):
        return None
    if layer._forward_hooks or layer._forward_pre_hooks or layer._backward_hooks or layer._backward_pre_hooks:
        return None
    return None if torch.is_autocast_enabled(x.device.type) else (weight, bias)


class _AddLowRank(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any,
        result: Tensor,
        x: Tensor,
        lora_A: Tensor,
        lora_B: Tensor,
        scaling: float,
        dropout: float,
        seed: Tensor | None,
    ) -> Tensor:
        rows = _rows(x)
        A, B = _cast([lora_A, lora_B], x.dtype)
        low = _scaled_product(_seen(rows, seed, dropout), A.T, scaling)
        out = torch.addmm(_rows(result), low, B.T)
        ctx.save_for_backward(rows, low, A, B, seed)
        ctx.scaling, ctx.dropout, ctx.dtypes = scaling, dropout, (lora_A.dtype, lora_B.dtype)
        return out.view(result.shape)

    @staticmethod
    def backward(ctx: Any, *grad_outputs: Tensor) -> tuple[Tensor | None, ...]:
        rows, low, A, B, seed = ctx.saved_tensors
        grad = _rows(grad_outputs[0])
        seen = _seen(rows, seed, ctx.dropout)
        d_low = _scaled_product(grad, B, ctx.scaling)
        d_A, d_B = _product(d_low.T, seen, ctx.dtypes[0]), _product(grad.T, low, ctx.dtypes[1])
        d_x = None
        if ctx.needs_input_grad[1]:
            # The mask of x, on its gradient.
            d_x = _seen(d_low @ A, seed, ctx.dropout).view(*grad_outputs[0].shape[:-1], A.shape[1])
        return grad_outputs[0], d_x, d_A, d_B, None, None, None


class _LoraLinear(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any, x: Tensor, scaling: float, dropout: float, seed: Tensor | None, *flat: Tensor
    ) -> tuple[Tensor, ...]:
        weights, biases, lora_As, lora_Bs = flat[0::4], flat[1::4], flat[2::4], flat[3::4]
        rows = _rows(x)
        A, *Bs = _cast([_stacked(lora_As), *lora_Bs], x.dtype)
        low = _scaled_product(_seen(rows, seed, dropout), A.T, scaling)
        ctx.save_for_backward(rows, low, A, seed, *weights, *Bs)
        ctx.scaling, ctx.dropout, ctx.dtypes = scaling, dropout, (lora_As[0].dtype, lora_Bs[0].dtype)
        own = zip(weights, biases, _apart(low, Bs, dim=1), Bs, strict=True)
        outs = [sum_of_products((rows, part), (W.T, B.T), bias) for W, bias, part, B in own]
        return tuple(out.view(*x.shape[:-1], out.shape[1]) for out in outs)

    @staticmethod
    def backward(ctx: Any, *grad_outputs: Tensor) -> tuple[Tensor | None, ...]:
        rows, low, A, seed, *frozen_and_Bs = ctx.saved_tensors
        count = len(grad_outputs)
        weights, Bs = frozen_and_Bs[:count], frozen_and_Bs[count:]
        grads = [_rows(grad) for grad in grad_outputs]
        seen = _seen(rows, seed, ctx.dropout)
        d_lows = [_scaled_product(grad, B, ctx.scaling) for grad, B in zip(grads, Bs, strict=True)]
        d_low = _stacked(d_lows, dim=1)
        d_A = _product(d_low.T, seen, ctx.dtypes[0])
        d_As = _apart(d_A, Bs, dim=0)
        d_Bs = [
            _product(g.T, part, ctx.dtypes[1]) for g, part in zip(grads, _apart(low, Bs, dim=1), strict=True)
        ]
        d_x = None
        if ctx.needs_input_grad[0] and seed is None:
            d_x = sum_of_products((*grads, d_low), (*weights, A))
        elif ctx.needs_input_grad[0]:
            from graphlora.ops.dropout.triton import add_dropped_product

            d_x = add_dropped_product(sum_of_products(grads, weights), d_low, A, seed, ctx.dropout)
        if d_x is not None:
            d_x = d_x.view(*grad_outputs[0].shape[:-1], A.shape[1])
        flat = [grad for pair in zip(d_As, d_Bs, strict=True) for grad in (None, None, *pair)]
        return d_x, None, None, None, *flat


def _seed(x: Tensor, dropout: float) -> Tensor | None:
    if not dropout:
        return None
    from graphlora.ops.dropout.triton import draw_seed

    return draw_seed(x.device)


def _seen(rows: Tensor, seed: Tensor | None, dropout: float) -> Tensor:
    """What A sees of the rows."""
    if seed is None:
        return rows
    from graphlora.ops.dropout.triton import dropped

    return dropped(rows, seed, dropout)


def _cast(tensors: list[Tensor], dtype: torch.dtype) -> list[Tensor]:
    """All in `dtype`, by one call."""
    if any(tensor.dtype == dtype for tensor in tensors):
        return [tensor.to(dtype) for tensor in tensors]
    cast = [torch.empty_like(tensor, dtype=dtype) for tensor in tensors]
    torch.ops.aten._foreach_copy_.default(cast, tensors)
    return cast


def _stacked(tensors: tuple[Tensor, ...] | list[Tensor], dim: int = 0) -> Tensor:
    return tensors[0] if len(tensors) == 1 else torch.cat(tensors, dim)


def _apart(stacked: Tensor, Bs: Sequence[Tensor], dim: int) -> Sequence[Tensor]:
    """What belongs to each pair of a tensor with the ranks of all along `dim`."""
    return [stacked] if len(Bs) == 1 else stacked.split([B.shape[1] for B in Bs], dim)


def _product(a: Tensor, b: Tensor, dtype: torch.dtype) -> Tensor:
    return product_float32(a, b) if dtype == torch.float32 else (a @ b).to(dtype)


def _scaled_product(a: Tensor, b: Tensor, scaling: float) -> Tensor:
    """`scaling * a @ b` in one call."""
    return torch.addmm(a.new_empty(1), a, b, beta=0, alpha=scaling)


def _rows(t: Tensor) -> Tensor:
    return t.reshape(t.shape[:-1].numel(), t.shape[-1])
