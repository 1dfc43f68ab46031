"""Products whose result is wider than their factors, or added to another."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor
from torch.utils._python_dispatch import is_in_torch_dispatch_mode


def product_float32(a: Tensor, b: Tensor, *, widen_factors: bool = False) -> Tensor:
    """`a @ b` in float32, accumulated in float32 on CUDA, where one product can do both.

    Args:
        a: `[m, k]`.
        b: `[k, n]`, in the dtype of `a`.
        widen_factors: On other devices convert the factors first, for accuracy, instead of the result, for speed.
    """
    if a.dtype == torch.float32:
        return a @ b
    if a.device.type == "cuda":
        return torch.mm(a, b, out_dtype=torch.float32)
    return a.float() @ b.float() if widen_factors else (a @ b).float()


def sum_of_products(lefts: Sequence[Tensor], rights: Sequence[Tensor], bias: Tensor | None = None) -> Tensor:
    """`lefts[0] @ rights[0] + lefts[1] @ rights[1] + ... + bias`; each product adds to those before it in place.

    Compilers get it as one operation. What they make of a sum is `addmm` into a tensor of its own, which copies the sum
    so far, as large as the result. Nor may an `autograd.Function` write into its result where PyTorch 2.11 traces: its
    inputs would train as if they were not used (PyTorch's issue 180642). No gradients of its own.

    Args:
        lefts: `[m, k_i]`, all in one dtype.
        rights: `[k_i, n]`, likewise.
        bias: `[n]`, likewise.

    Returns:
        `[m, n]`.
    """
    if torch.compiler.is_compiling():
        return torch.ops.graphlora.sum_of_products.default(list(lefts), list(rights), bias)
    return _sum_of_products(lefts, rights, bias)


def _sum_of_products(lefts: Sequence[Tensor], rights: Sequence[Tensor], bias: Tensor | None) -> Tensor:
    total = torch.mm(lefts[0], rights[0]) if bias is None else torch.addmm(bias, lefts[0], rights[0])
    # Selective checkpointing, a dispatch mode, refuses what it keeps where that is written to later.
    add = torch.addmm if is_in_torch_dispatch_mode() else Tensor.addmm_
    for left, right in zip(lefts[1:], rights[1:], strict=True):
        total = add(total, left, right)
    return total


_library = torch.library.Library("graphlora", "FRAGMENT")
_library.define("sum_of_products(Tensor[] lefts, Tensor[] rights, Tensor? bias) -> Tensor")
_library.impl("sum_of_products", _sum_of_products, "CompositeExplicitAutograd")
torch.library.register_fake(
    "graphlora::sum_of_products",
    lambda lefts, rights, _: lefts[0].new_empty(lefts[0].shape[0], rights[0].shape[1]),
)
