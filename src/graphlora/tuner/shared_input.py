"""Attention projections that read one tensor are computed together, in the call of the first."""

from __future__ import annotations

from functools import partial
from typing import Any, NamedTuple, Protocol

import torch
from torch import Tensor, nn

from graphlora.ops.decode import lora_linears_decode
from graphlora.ops.lora_linear import AdaptedMatrix, lora_linears

_SIBLINGS = ("q_proj", "k_proj", "v_proj")


class Adapted(NamedTuple):
    """What a projection computes: `W x + b + scaling * B A dropped(x)`.

    Attributes:
        matrix: W, b, A and B.
        scaling: lora_alpha / r.
        dropout: probability of dropping entries of the x that A sees.
        decodes: whether the kernels for few tokens compute it.
    """

    matrix: AdaptedMatrix
    scaling: float
    dropout: float
    decodes: bool

    def goes_with(self, other: Adapted) -> bool:
        """Whether one call can compute both."""
        mine, its = self.matrix, other.matrix
        same_dtypes = mine.lora_A.dtype == its.lora_A.dtype and mine.lora_B.dtype == its.lora_B.dtype
        return same_dtypes and self[1:] == other[1:]


class Projection(Protocol):
    """What `SharedInput` asks of a projection."""

    shared_input: SharedInput

    def adapted_matrix(self, x: Tensor) -> Adapted | None:
        """What calling it on `x` computes; None where that is something else."""


class SharedInput:
    """Outputs of sibling projections that wait for the calls they belong to.

    A model calls `q_proj`, `k_proj` and `v_proj` one after the other with the same tensor. The first call computes the
    outputs of all, and the others find theirs here. That the tensor is the same is seen by its identity and version, so
    a projection that is called alone, or with another tensor or content, gives what it would give by itself. Threads
    may call one model at once.

    Args:
        layers: the projections; those of one attention module.
    """

    def __init__(self, layers: list[Projection]) -> None:
        self.layers = layers
        # The tensor, its version, and outputs by place among the layers: names would make a compiler trace each
        # attention module by itself. One attribute, which another thread exchanges as a whole.
        self._kept: tuple[Tensor, int, dict[int, Tensor]] | None = None

    def collect(self, layer: Projection, x: Tensor) -> Tensor | None:
        """The output of `layer` for this very `x`, where a sibling's call computed it; once."""
        kept = self._kept
        if kept is None or kept[0] is not x:
            return None
        place = self._place(layer)
        if place is None or kept[1] != _version(x):
            return None
        out = kept[2].pop(place, None)
        if not kept[2]:
            self._kept = None
        return out

    def compute(self, layer: Projection, x: Tensor, adapted: Adapted) -> Tensor:
        """The output of `layer`, computed with those of the siblings that can be; all drop the same entries of x.

        Args:
            layer: the projection that is called.
            x: `[..., in]`.
            adapted: what it computes.
        """
        places, matrices = [], [adapted.matrix]
        if self._place(layer) is not None:
            for place, other in enumerate(self.layers):
                found = None if other is layer else other.adapted_matrix(x)
                if found is not None and found.goes_with(adapted):
                    places.append(place)
                    matrices.append(found.matrix)
        own, *others = _outputs(x, matrices, adapted)
        if others:
            self._kept = x, _version(x), dict(zip(places, others, strict=True))
        return own

    def _place(self, layer: Projection) -> int | None:
        """None for the copies that `nn.DataParallel` makes of a layer: they share this object from other threads."""
        for place, other in enumerate(self.layers):
            if other is layer:
                return place
        return None

    def __getstate__(self) -> dict[str, Any]:
        """Copies and files get no outputs: some wait where a forward was interrupted."""
        return {"layers": self.layers, "_kept": None}


def _version(x: Tensor) -> int:
    """Counts what was written to x in place; 0 where nothing counts, and for compilers, which know what is written."""
    return 0 if torch.compiler.is_compiling() or x.is_inference() else x._version


def _outputs(x: Tensor, matrices: list[AdaptedMatrix], adapted: Adapted) -> tuple[Tensor, ...]:
    if not adapted.decodes:
        return lora_linears(x, matrices, adapted.scaling, adapted.dropout)
    bases = [partial(nn.functional.linear, weight=matrix.weight, bias=matrix.bias) for matrix in matrices]
    lora_As, lora_Bs = [matrix.lora_A for matrix in matrices], [matrix.lora_B for matrix in matrices]
    return lora_linears_decode(x, bases, lora_As, lora_Bs, adapted.scaling)


def share_input(attention: nn.Module, kind: type[nn.Module]) -> None:
    """Lets the projections of an attention module be computed together where they read one tensor.

    Args:
        attention: the module that holds them.
        kind: class of those that can.
    """
    if "cross" in type(attention).__name__.lower() or getattr(attention, "is_kv_shared_layer", False):
        return
    layers: list[Any] = [getattr(attention, name, None) for name in _SIBLINGS]
    layers = [layer for layer in layers if isinstance(layer, kind)]
    shared = SharedInput(layers)
    for layer in layers:
        layer.shared_input = shared
