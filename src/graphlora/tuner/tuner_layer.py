"""What all adapted layers share as PEFT tuner layers, and what all layers with a router share."""

from __future__ import annotations

import re
import warnings
from abc import abstractmethod
from typing import Any, cast

from peft.tuners.tuners_utils import BaseTunerLayer
from torch import nn

from graphlora.errors import GraphLoraError
from graphlora.gates import DenseRouter, SparsegenRouter, TopPRouter
from graphlora.router import CenteredRouter, LinearRouter, Routing
from graphlora.tuner.config import GraphLoraConfig
from graphlora.tuner.coordination import Coordination
from graphlora.tuner.record import Recorder

_TRL_REFERENCE = "ref"


class TunerLayer(nn.Module, BaseTunerLayer):
    """What the adapted layers share: one active adapter at a time, and a clear refusal to merge."""

    def __init__(self, base_layer: nn.Module, block_name: str) -> None:
        nn.Module.__init__(self)
        self.base_layer = base_layer
        self.block_name = block_name
        self.configs: dict[str, GraphLoraConfig] = {}
        self.scaling: dict[str, float] = {}
        self.merged_adapters: list[str] = []
        self._disable_adapters = False

    @abstractmethod
    def update_layer(self, adapter_name: str, config: GraphLoraConfig, inference_mode: bool = False) -> None:
        """Adds an adapter to this layer."""

    def active_name(self, adapters: nn.ModuleDict) -> str | None:
        """Name of the active adapter that this layer holds, or None where the base layer runs alone."""
        if self.disable_adapters:
            return None
        found = None
        for name in self.active_adapters:
            if name in adapters:
                if found is not None:
                    raise GraphLoraError(
                        f"GraphLoRA runs one adapter at a time, but {found} and {name} are active; "
                        "call set_adapter with one name."
                    )
                found = name
        return found

    def merge(self, safe_merge: bool = False, adapter_names: list[str] | None = None) -> None:
        """Refused: see `unmergeable`."""
        raise unmergeable()

    def unmerge(self) -> None:
        """Nothing is ever merged."""
        warnings.warn("GraphLoRA adapters are never merged; there is nothing to unmerge.", stacklevel=2)

    def _get_base_layer_device_and_dtype(self, base_layer: nn.Module) -> tuple[Any, Any]:
        device, dtype = None, None
        for module in base_layer.modules():
            for weight in module._parameters.values():
                if weight is None:
                    continue
                device = device or weight.device
                if weight.dtype.is_floating_point and weight.element_size() >= 2:
                    return weight.device, getattr(module, "compute_dtype", None) or weight.dtype
        return device, dtype

    def _forget(self, adapter_name: str) -> None:
        self.configs.pop(adapter_name, None)
        self.scaling.pop(adapter_name, None)

    def delete_adapter(self, adapter_name: str) -> None:
        """See PEFT's `delete_adapter`."""
        super().delete_adapter(adapter_name)
        self._forget(adapter_name)


def unmergeable() -> GraphLoraError:
    """Why a GraphLoRA adapter cannot be folded into the base weights."""
    return GraphLoraError(
        "A GraphLoRA adapter cannot be merged into the base weights: which experts apply depends on the token. "
        "Keep the adapter loaded, or call unload() for the base model."
    )


class RoutedLayer(TunerLayer):
    """A layer with a router: an FFN block, or one projection.

    Per adapter it holds `graphlora_router` and `graphlora_coordination`; each keeps its parameters flat, as PEFT's
    adapter files need.

    Args:
        base_layer: the frozen module.
        block_name: its name in the model.
        block_index: its position among the adapted layers; seeds its random graph.
        side: `"encoder"` or `"decoder"`: which attention mask belongs to its tokens.
        recorder: where routing is recorded.
        depth: index of its decoder layer, and their number.

    Attributes:
        routings: what the recorder keeps of this layer while a forward is recorded.
    """

    other_param_names = ()
    graphlora_router: nn.ModuleDict
    graphlora_coordination: nn.ModuleDict

    def __init__(
        self,
        base_layer: nn.Module,
        block_name: str,
        block_index: int,
        side: str,
        recorder: Recorder,
        depth: tuple[int, int] = (0, 1),
    ) -> None:
        super().__init__(base_layer, block_name)
        self.block_index, self.side, self.recorder, self.depth = block_index, side, recorder, depth
        self.routings: list[Routing] = []
        for name in self.adapter_layer_names:
            setattr(self, name, nn.ModuleDict())

    def router(self, adapter_name: str) -> CenteredRouter:
        """The router of an adapter."""
        return cast(CenteredRouter, self.graphlora_router[adapter_name])

    def coordination(self, adapter_name: str) -> Coordination:
        """lambda, sigma and loads of an adapter."""
        return cast(Coordination, self.graphlora_coordination[adapter_name])

    def twins(self, adapter_name: str) -> list[tuple[int, int]]:
        """Pairs of experts that the router can never tell apart."""
        del adapter_name
        return []

    def _num_experts(self, config: GraphLoraConfig) -> int:
        """N here: by name, else by depth, else that of all layers."""
        counts, (index, num_layers) = config.num_experts_by_layer, self.depth
        by_depth = counts[index * len(counts) // num_layers] if counts else config.num_experts
        return from_pattern(config.num_experts_pattern, self.block_name, by_depth)

    def _add_router(self, adapter_name: str, config: GraphLoraConfig, router: CenteredRouter) -> None:
        self.graphlora_router[adapter_name] = router
        self.graphlora_coordination[adapter_name] = Coordination(
            router.num_experts, config.poisson_rate_form, config.normal_scale_form
        )
        self._copy_state_for_reference(adapter_name, config)

    def _copy_state_for_reference(self, adapter_name: str, config: GraphLoraConfig) -> None:
        """Copies graph, features and running state into the frozen reference that TRL makes of a trained adapter.

        TRL adds an adapter of that name with the same configuration object, and copies the parameters alone.
        """
        original = next((name for name, other in self.configs.items() if other is config), None)
        if adapter_name != _TRL_REFERENCE or original is None:
            return
        for modules in (self.graphlora_router, self.graphlora_coordination):
            buffers = dict(modules[original].named_buffers())
            for name, buffer in modules[adapter_name].named_buffers():
                buffer.copy_(buffers[name])

    def _router_options(self, config: GraphLoraConfig) -> dict[str, Any]:
        """What every kind of router takes."""
        seed = config.graph_seed if config.shared_graph else config.graph_seed * 100_003 + self.block_index
        return {
            "input_norm": config.router_input_norm,
            "centering": config.router_logit_centering,
            "seed": seed,
            "spread": config.router_init_spread,
        }

    def _linear_router(self, config: GraphLoraConfig, hidden_size: int, num_experts: int) -> LinearRouter:
        """A router without a graph, with the configured gate."""
        options = self._router_options(config) | {"bias": config.router_bias, "init": config.router_init}
        if config.router_gate == "dense":
            return DenseRouter(hidden_size, num_experts, **options)
        if config.router_gate == "top_p":
            return TopPRouter(
                hidden_size,
                num_experts,
                top_p=config.router_top_p,
                entropy_index=config.router_entropy_index,
                entropy_threshold=config.router_entropy_threshold,
                **options,
            )
        if config.router_gate == "sparsegen":
            return SparsegenRouter(hidden_size, num_experts, width=config.router_hidden_size, **options)
        return LinearRouter(hidden_size, num_experts, **options)


def from_pattern(pattern: dict[str, Any], name: str, default: Any) -> Any:
    """Value of the first key that is a suffix of `name` or a regular expression for it."""
    for key, value in pattern.items():
        if name == key or name.endswith("." + key) or re.fullmatch(rf"(.*\.)?({key})", name):
            return value
    return default
