"""The one seam through which routing leaves the layers: a record that is open for a single forward."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import TYPE_CHECKING

import torch

from graphlora.errors import GraphLoraError
from graphlora.router import Routing

if TYPE_CHECKING:
    from graphlora.tuner.layer import GraphLoraLayer


@dataclass
class RoutingRecord:
    """Routing of every FFN block in one forward, in the order in which the blocks ran.

    Attributes:
        entries: pairs of layer and routing.
        training: whether this forward is optimized (training mode, gradients on).
    """

    training: bool
    entries: list[tuple[GraphLoraLayer, Routing]] = field(default_factory=list)

    def add(self, layer: GraphLoraLayer, routing: Routing) -> None:
        """Called by a layer.

        Raises:
            GraphLoraError: under reentrant activation checkpointing, whose first pass has no gradients.
        """
        if self.training and not torch.is_grad_enabled():
            raise GraphLoraError(
                "Reentrant activation checkpointing runs the blocks without gradients, so the auxiliary losses would "
                'train nothing; set gradient_checkpointing_kwargs={"use_reentrant": False}.'
            )
        self.entries.append((layer, routing))


class Recorder:
    """Where layers report their routing; shared by a model and its layers.

    Attributes:
        record: the record of the forward that runs now, if it is recorded.
        watched: routing by block name of the latest forwards, while somebody watches.
    """

    def __init__(self) -> None:
        self.record: RoutingRecord | None = None
        self.watched: dict[str, Routing] | None = None

    def add(self, layer: GraphLoraLayer, routing: Routing) -> None:
        """Called by a layer once per forward."""
        if self.record is not None:
            self.record.add(layer, routing)
        if self.watched is not None:
            tensors = (t.detach() for t in vars(routing).values())
            self.watched[layer.block_name] = Routing(*tensors)

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
