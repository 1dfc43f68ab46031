"""The one seam through which routing leaves the layers: open for a single forward.

Compiled layers must be able to record too. So a layer appends to a list of its own, which is empty whenever the layer
begins: all layers, and all steps, look the same to the compiler.
"""

from __future__ import annotations

import sys
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from graphlora.errors import GraphLoraError
from graphlora.router import Routing

if TYPE_CHECKING:
    from graphlora.tuner.tuner_layer import RoutedLayer


@dataclass
class RoutingRecord:
    """Routing of every routed layer in one forward, low to high.

    Attributes:
        training: whether this forward is optimized (training mode, gradients on).
        entries: pairs of layer and routing; several in a row for a block that ran several times.
        share: share of the optimized batch that this forward is; the weight of its auxiliary loss.
    """

    training: bool
    entries: list[tuple[RoutedLayer, Routing]] = field(default_factory=list)
    share: Tensor | float = 1.0


class Recorder:
    """Where layers report their routing; shared by a model and its layers.

    Attributes:
        is_open: whether the forward that runs now is recorded.
        training: whether it is optimized (training mode, gradients on).
        watched: routing by block name of the latest forwards, while somebody watches.
    """

    def __init__(self) -> None:
        self.is_open = False
        self.training = False
        self.watched: dict[str, Routing] | None = None
        self._layers: Sequence[RoutedLayer] = ()

    def open(self, layers: Sequence[RoutedLayer], training: bool) -> None:
        """Records the forward that begins now.

        Args:
            layers: the layers that report, low to high.
            training: whether the forward is optimized.
        """
        self._layers, self.is_open, self.training = layers, True, training
        for layer in layers:
            layer.routings.clear()

    def close(self) -> RoutingRecord | None:
        """What was recorded since `open`; None where nothing was to be recorded."""
        if not self.is_open:
            return None
        record = RoutingRecord(self.training)
        for layer in self._layers:
            record.entries += [(layer, routing) for routing in layer.routings]
            layer.routings.clear()
        self._layers, self.is_open, self.training = (), False, False
        if self.watched is not None:
            for layer, routing in record.entries:
                detached = {name: tensor.detach() for name, tensor in vars(routing).items()}
                self.watched[layer.block_name] = replace(routing, **detached)
        return record

    def add(self, layer: RoutedLayer, routing: Routing) -> None:
        """Called by a layer once per forward, compiled or not.

        Raises:
            GraphLoraError: under reentrant activation checkpointing, whose first pass has no gradients.
        """
        if not self.is_open:
            return
        if self.training and not torch.is_grad_enabled():
            raise GraphLoraError(
                "Reentrant activation checkpointing runs the blocks without gradients, so the auxiliary losses would "
                'train nothing; set gradient_checkpointing_kwargs={"use_reentrant": False}.'
            )
        layer.routings.append(routing)

    @contextmanager
    def watch(self) -> Iterator[dict[str, Routing]]:
        """Collects the routing of the forwards run inside, by block name; of several forwards, the last."""
        self.watched = {}
        try:
            yield self.watched
        finally:
            self.watched = None

    def __deepcopy__(self, memo: dict[int, object]) -> Recorder:
        copy = Recorder()
        memo[id(self)] = copy
        return copy


def let_checkpointed_layers_record() -> None:
    """Lets the compiler trace layers that record inside an activation checkpoint, instead of leaving them uncompiled.

    It then runs what a layer records in forward alone, not again when backward recomputes the layer; a closed recorder
    ignores the second time anyway. The setting holds for the whole process and matters to checkpointed regions that
    change Python objects. PyTorch before 2.9 does not have it.
    """
    dynamo = sys.modules.get("torch._dynamo")
    if dynamo is not None and hasattr(dynamo.config, "skip_fwd_side_effects_in_bwd_under_checkpoint"):
        dynamo.config.skip_fwd_side_effects_in_bwd_under_checkpoint = True
