"""The decode kernels as `torch.library` operators: single nodes for `torch.compile`, with fakes that know the shapes.

On CUDA they run the Triton kernels. On the CPU they run the same kernels in Triton's interpreter where it is on, else
the references. None of them has a backward.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from graphlora.ops.backend import has_triton, interprets_triton
from graphlora.ops.decode import reference
from graphlora.ops.operations import launches_kernels, operation

_library = torch.library.Library("graphlora", "FRAGMENT")


def _project_shapes(x: Tensor, first: Tensor, second: Tensor, third: Tensor) -> tuple[Tensor, Tensor]:
    rows = first.shape[0] + second.shape[0] + third.shape[0]
    return x.new_empty(x.shape[0], rows, dtype=torch.float32), x.new_empty(x.shape[0], dtype=torch.float32)


def _low_rank_shape(x: Tensor, weights: list[Tensor]) -> Tensor:
    parts = -(-x.shape[1] // reference.SPLIT_DEPTH)
    return x.new_empty(parts, x.shape[0], sum(weight.shape[0] for weight in weights), dtype=torch.float32)


def _add_low_rank_shapes(low: Tensor, bases: list[Tensor], *_: Any) -> list[Tensor]:
    return [base.new_empty(base.shape) for base in bases]


def _mix_shapes(gate: Tensor, *args: Any) -> tuple[Tensor, Tensor]:
    down_A, top_k_index = args[4], args[6]
    parts = -(-gate.shape[1] // reference.F_BLOCK)
    sizes = (parts, gate.shape[0], top_k_index.shape[1], down_A.shape[1])
    return gate.new_empty(gate.shape), gate.new_empty(sizes, dtype=torch.float32)


def _base_shape(base: Tensor, *_: Any) -> Tensor:
    return base.new_empty(base.shape)


def _define(name: str, arguments: str, shapes: Callable[..., Any]) -> Callable[..., Any]:
    """Defines `graphlora::decode_NAME` by the functions of that name beside this file; returns what calls it."""

    @launches_kernels
    def kernel(*args: Any) -> Any:
        from graphlora.ops.decode import triton

        return getattr(triton, name)(*args)

    def on_cpu(*args: Any) -> Any:
        interpreted = has_triton() and interprets_triton()
        return (kernel if interpreted else getattr(reference, name))(*args)

    _library.define(f"decode_{name}{arguments}")
    _library.impl(f"decode_{name}", kernel, "CUDA")
    _library.impl(f"decode_{name}", on_cpu, "CPU")
    torch.library.register_fake(f"graphlora::decode_{name}", shapes, lib=_library)

    def call(*args: Any) -> Any:
        run = kernel if args[0].device.type == "cuda" else on_cpu
        return operation(f"decode_{name}", run, args[0])(*args)

    return call


project = _define(
    "project", "(Tensor x, Tensor first, Tensor second, Tensor third) -> (Tensor, Tensor)", _project_shapes
)
low_rank = _define("low_rank", "(Tensor x, Tensor[] weights) -> Tensor", _low_rank_shape)
add_low_rank = _define(
    "add_low_rank",
    "(Tensor low, Tensor[] bases, Tensor[] weights, float scaling) -> Tensor[]",
    _add_low_rank_shapes,
)
mix = _define(
    "mix",
    "(Tensor gate, Tensor up, Tensor low, Tensor gate_B, Tensor up_B, Tensor down_A, Tensor top_k_weights, "
    "Tensor top_k_index, float scaling, str act) -> (Tensor, Tensor)",
    _mix_shapes,
)
combine = _define(
    "combine",
    "(Tensor base, Tensor low, Tensor top_k_index, Tensor down_B, float scaling) -> Tensor",
    _base_shape,
)
