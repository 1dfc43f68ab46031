"""Which layer an adapter puts where: on an FFN block, on each of its projections, or on an attention projection."""

from __future__ import annotations

from dataclasses import dataclass

from torch import nn

from graphlora.errors import GraphLoraError
from graphlora.tuner import ffn
from graphlora.tuner.config import GraphLoraConfig
from graphlora.tuner.layer import GraphLoraLayer, GraphLoraLinear
from graphlora.tuner.projection import GraphLoraProjection
from graphlora.tuner.record import Recorder
from graphlora.tuner.shared_input import share_input
from graphlora.tuner.tuner_layer import RoutedLayer, TunerLayer

_CROSS_ATTENTION = {"EncDecAttention", "encoder_attn", "crossattention", "cross_attn"}
_KEYS_AND_VALUES = {"k", "v", "k_proj", "v_proj", "key", "value"}


@dataclass(frozen=True)
class Placement:
    """Puts one adapter on the modules of a model.

    Attributes:
        model: the base model, with the layers that are already adapted.
        recorder: where its routed layers report.
        config: the adapter's configuration.
        adapter_name: its name.
        is_active: whether it is trained from the start.
    """

    model: nn.Module
    recorder: Recorder
    config: GraphLoraConfig
    adapter_name: str
    is_active: bool

    def place(self, parent: nn.Module, target_name: str, key: str) -> None:
        """Adds the adapter to one target: an FFN block or a linear layer outside of it.

        Args:
            parent: the module that holds the target.
            target_name: the target's name in it.
            key: the target's name in the model.

        Raises:
            GraphLoraError: where the target cannot be adapted, or carries an adapter of another kind.
        """
        target = getattr(parent, target_name)
        if ffn.is_linear(target):
            kind = GraphLoraProjection if self.config.attention_experts else GraphLoraLinear
            self._adapt(kind, parent, target_name, key)
            return
        projections = ffn.projection_names(target, key, self.config.ffn_modules)
        if self.config.router_scope == "projection":
            if isinstance(target, GraphLoraLayer):
                raise _adapted_otherwise(key)
            for name in projections:
                self._adapt(GraphLoraProjection, target, name, f"{key}.{name}")
            return
        if any(isinstance(getattr(target, name, None), GraphLoraProjection) for name in projections):
            raise _adapted_otherwise(key)
        self._adapt(GraphLoraLayer, parent, target_name, key)

    def _adapt(self, kind: type[TunerLayer], parent: nn.Module, target_name: str, key: str) -> None:
        target = getattr(parent, target_name)
        inference = self.config.inference_mode
        if isinstance(target, TunerLayer):
            if type(target) is not kind:
                raise _adapted_otherwise(key)
            target.update_layer(self.adapter_name, self.config, inference)
            return
        new = self._new_layer(kind, target, key)
        new.update_layer(self.adapter_name, self.config, inference)
        if not self.is_active:
            new.requires_grad_(False)
        new.train(target.training)
        setattr(parent, target_name, new)
        if kind is GraphLoraLinear:
            share_input(parent, kind)

    def _new_layer(self, kind: type[TunerLayer], target: nn.Module, key: str) -> TunerLayer:
        if kind is GraphLoraLinear:
            return GraphLoraLinear(target, key)
        index = sum(isinstance(module, RoutedLayer) for module in self.model.modules())
        where = (key, index, self._side(key), self.recorder, self._depth(key))
        if kind is GraphLoraProjection:
            return GraphLoraProjection(target, *where)
        parts = ffn.take_apart(target, key, self.config.ffn_modules)
        ffn.check_parts(parts, key)
        return GraphLoraLayer(parts, *where)

    def _side(self, key: str) -> str:
        """Whose tokens the module sees: keys and values of cross-attention see the encoder's."""
        parts = key.split(".")
        if not getattr(getattr(self.model, "config", None), "is_encoder_decoder", False):
            return "decoder"
        crosses = not _CROSS_ATTENTION.isdisjoint(parts) and parts[-1] in _KEYS_AND_VALUES
        return "encoder" if "encoder" in parts or crosses else "decoder"

    def _depth(self, key: str) -> tuple[int, int]:
        """Index of the layer that holds the module, and the number of layers; `(0, 1)` outside of layers."""
        parts = key.split(".")
        for i, part in enumerate(parts):
            if part.isdigit():
                return int(part), len(list(self.model.get_submodule(".".join(parts[:i])).children()))
        return 0, 1


def _adapted_otherwise(key: str) -> GraphLoraError:
    return GraphLoraError(
        f"{key} already carries an adapter with another router_scope or attention_experts, whose file would no longer "
        "fit; put the two adapters on separate copies of the base model."
    )
