"""Attention projections that read one tensor are computed together, in the call of the first."""

from __future__ import annotations

from typing import Any, Protocol

from torch import Tensor, nn

from graphlora.ops.lora_linear import AdaptedMatrix, lora_linears

_SIBLINGS = ("q_proj", "k_proj", "v_proj")


class Projection(Protocol):
    """What `SharedInput` asks of a projection."""

    shared_input: SharedInput

    def adapted_matrix(self, x: Tensor) -> tuple[AdaptedMatrix, float] | None:
        """Matrix with its low-rank pair, and the scaling; None where calling it on `x` is more than these."""


class SharedInput:
    """Outputs of sibling projections that wait for the calls they belong to.

    A model calls `q_proj`, `k_proj` and `v_proj` one after the other with the same tensor. The first call computes the
    outputs of all, and the others find theirs here. That the tensor is the same is seen by its identity, so a
    projection that is called alone, or with another tensor, gives what it would give by itself.

    Args:
        layers: the projections; those of one attention module.
    """

    def __init__(self, layers: list[Projection]) -> None:
        self.layers = layers
        self._x: Tensor | None = None
        # By place among the layers: names would make a compiler trace each attention module by itself.
        self._waiting: dict[int, Tensor] = {}

    def collect(self, layer: Projection, x: Tensor) -> Tensor | None:
        """The output of `layer` for this very `x`, where a sibling's call computed it; once."""
        place = self._place(layer)
        if self._x is not x or place is None:
            return None
        out = self._waiting.pop(place, None)
        if not self._waiting:
            self._x = None
        return out

    def compute(self, layer: Projection, x: Tensor, matrix: AdaptedMatrix, scaling: float) -> Tensor:
        """The output of `layer`, computed with those of the siblings that can be.

        Args:
            layer: the projection that is called.
            x: `[..., in]`.
            matrix: what it computes.
            scaling: of its pair.
        """
        places, matrices = [], [matrix]
        if self._place(layer) is not None:
            for place, other in enumerate(self.layers):
                found = None if other is layer else other.adapted_matrix(x)
                if found is not None and found[1] == scaling and _dtypes(found[0]) == _dtypes(matrix):
                    places.append(place)
                    matrices.append(found[0])
        own, *others = lora_linears(x, matrices, scaling)
        if others:
            self._x, self._waiting = x, dict(zip(places, others, strict=True))
        return own

    def _place(self, layer: Projection) -> int | None:
        """None for the copies that `nn.DataParallel` makes of a layer: they share this object from other threads."""
        for place, other in enumerate(self.layers):
            if other is layer:
                return place
        return None

    def __getstate__(self) -> dict[str, Any]:
        """Copies and files get no outputs: some wait where a forward was interrupted."""
        return {"layers": self.layers, "_x": None, "_waiting": {}}


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


def _dtypes(matrix: AdaptedMatrix) -> tuple[Any, Any]:
    return matrix.lora_A.dtype, matrix.lora_B.dtype
