"""An adapted projection with a router of its own: how the methods place experts that do not see an FFN as one whole."""

from __future__ import annotations

from typing import Any, cast

import torch
from torch import Tensor, nn

from graphlora.experts import LoraExperts, dense_mixing, lora_delta_loop, mixed_lora_delta
from graphlora.tuner.config import GraphLoraConfig
from graphlora.tuner.ffn import features
from graphlora.tuner.record import Recorder
from graphlora.tuner.tuner_layer import RoutedLayer, from_pattern


class GraphLoraProjection(RoutedLayer):
    """A linear layer with a router and LoRA experts, `W x + s sum_e w_e(x) B_e A_e dropout(x)`.

    The frozen product is shared by the experts, and all of their low-rank products are two matrix products.

    Args:
        base_layer: the frozen linear layer, quantized or not.
        block_name: its name in the model.
        block_index: see `RoutedLayer`.
        side: see `RoutedLayer`.
        recorder: see `RoutedLayer`.
        depth: see `RoutedLayer`.
    """

    adapter_layer_names = ("graphlora_experts", "graphlora_router", "graphlora_coordination")
    graphlora_experts: nn.ModuleDict

    def __init__(
        self,
        base_layer: nn.Module,
        block_name: str,
        block_index: int,
        side: str,
        recorder: Recorder,
        depth: tuple[int, int] = (0, 1),
    ) -> None:
        super().__init__(base_layer, block_name, block_index, side, recorder, depth)
        self.in_features, self.out_features = features(base_layer)

    def update_layer(self, adapter_name: str, config: GraphLoraConfig, inference_mode: bool = False) -> None:
        """Adds an adapter to this projection."""
        num_experts = self._num_experts(config)
        r = from_pattern(config.rank_pattern, self.block_name, config.r)
        alpha = from_pattern(config.alpha_pattern, self.block_name, config.lora_alpha)
        self.graphlora_experts[adapter_name] = LoraExperts(
            num_experts, self.in_features, self.out_features, r, config.shared_lora_A
        )
        self._add_router(adapter_name, config, self._linear_router(config, self.in_features, num_experts))
        self.configs[adapter_name] = config
        self.scaling[adapter_name] = alpha / r
        self._move_adapter_to_device_of_base_layer(adapter_name)
        self.set_adapter(self.active_adapters, inference_mode=inference_mode)

    def forward(self, x: Tensor, *args: Any, **kwargs: Any) -> Tensor:
        """Adapted output `[..., out]`, in the dtype of the base layer's.

        Args:
            x: `[..., in]`.
            *args: passed to the base layer.
            **kwargs: likewise.
        """
        result = self.base_layer(x, *args, **kwargs)
        name = self.active_name(self.graphlora_router)
        if name is None:
            return result
        config = self.configs[name]
        rows = x.reshape(-1, x.shape[-1])
        # The router sees the token as it comes, before it is rounded to the dtype of the products.
        routing = self.router(name).route(rows, "torch", config.top_k, config.norm_topk_prob)
        self.recorder.add(self, routing)
        lora_A, lora_B = cast(LoraExperts, self.graphlora_experts[name])()
        rows = rows.to(result.dtype)
        if self.training and config.lora_dropout:
            rows = nn.functional.dropout(rows, config.lora_dropout)
        mixing = dense_mixing(routing.top_k_weights, routing.top_k_index, len(lora_B))
        delta = lora_delta_loop if config.backend == "eager" else mixed_lora_delta
        with torch.autocast(result.device.type, enabled=False):
            low_rank = delta(rows, lora_A.to(rows.dtype), lora_B.to(rows.dtype), mixing, self.scaling[name])
        return result + low_rank.view(result.shape)
