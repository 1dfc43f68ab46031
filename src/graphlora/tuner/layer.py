"""The adapted FFN block and the adapted attention projection, as PEFT tuner layers."""

from __future__ import annotations

from typing import Any, cast

import torch
from torch import Tensor, nn

from graphlora.experts import LoraExperts
from graphlora.graph import twin_experts
from graphlora.moe import MoeSettings, low_rank_matrices, moe_ffn
from graphlora.moe_decode import moe_ffn_decode
from graphlora.ops.backend import resolve_backend
from graphlora.ops.decode import few_tokens, lora_linears_decode
from graphlora.ops.expert_ffn import ExpertWeights, FrozenFfn
from graphlora.ops.expert_ffn.support import unsupported
from graphlora.ops.lora_linear import AdaptedMatrix, add_low_rank, plain_matrix
from graphlora.router import CenteredRouter, GraphRouter, build_adjacency
from graphlora.tuner.config import GraphLoraConfig
from graphlora.tuner.ffn import FfnParts, features
from graphlora.tuner.record import Recorder
from graphlora.tuner.shared_input import Adapted, SharedInput
from graphlora.tuner.tuner_layer import RoutedLayer, TunerLayer, from_pattern

_PROJECTIONS = ("gate_proj", "up_proj", "down_proj")
_DECODE_TOP_K = 8
# Asked while a layer is traced; its answer, and its warning, belong to the traced code.
_resolve_backend = torch.compiler.assume_constant_result(resolve_backend)


class GraphLoraLayer(RoutedLayer):
    """An FFN block with a router and LoRA experts.

    Per adapter it holds `graphlora_{gate,up,down}_proj` (`LoraExperts`), `graphlora_router` and
    `graphlora_coordination`; each keeps its parameters flat, as PEFT's adapter files need.

    Args:
        parts: the frozen FFN block, taken apart.
        block_name: its name in the model.
        block_index: its position among the adapted blocks; seeds its random graph.
        side: `"encoder"` or `"decoder"`: which attention mask belongs to its tokens.
        recorder: where routing is recorded.
        depth: index of its decoder layer, and their number.

    Attributes:
        unsupported: by adapter, what the Triton kernels cannot do of this block (see `resolve_backend`).
    """

    adapter_layer_names = (
        *(f"graphlora_{name}" for name in _PROJECTIONS),
        "graphlora_router",
        "graphlora_coordination",
    )
    graphlora_gate_proj: nn.ModuleDict
    graphlora_up_proj: nn.ModuleDict
    graphlora_down_proj: nn.ModuleDict

    def __init__(
        self,
        parts: FfnParts,
        block_name: str,
        block_index: int,
        side: str,
        recorder: Recorder,
        depth: tuple[int, int] = (0, 1),
    ) -> None:
        super().__init__(parts.block, block_name, block_index, side, recorder, depth)
        self.parts = parts
        self.ffn = FrozenFfn(
            parts.project_in, parts.project_out, parts.act, parts.plain_weights, parts.plain_down
        )
        self.unsupported: dict[str, str | None] = {}

    def update_layer(self, adapter_name: str, config: GraphLoraConfig, inference_mode: bool = False) -> None:
        """Adds an adapter to this block."""
        num_experts = self._num_experts(config)
        r = from_pattern(config.rank_pattern, self.block_name, config.r)
        alpha = from_pattern(config.alpha_pattern, self.block_name, config.lora_alpha)
        d, f = self.parts.hidden_size, self.parts.intermediate_size
        sizes = {"gate_proj": (d, f), "up_proj": (d, f), "down_proj": (f, d)}
        for name in _PROJECTIONS if self.parts.gated else _PROJECTIONS[1:]:
            getattr(self, f"graphlora_{name}")[adapter_name] = LoraExperts(num_experts, *sizes[name], r)
        self._add_router(adapter_name, config, self._build_router(config, num_experts))
        self.unsupported[adapter_name] = self._kernels_lack(config, num_experts, r)
        self.configs[adapter_name] = config
        self.scaling[adapter_name] = alpha / r
        self._move_adapter_to_device_of_base_layer(adapter_name)
        self.set_adapter(self.active_adapters, inference_mode=inference_mode)

    def _kernels_lack(self, config: GraphLoraConfig, num_experts: int, r: int) -> str | None:
        """What the Triton kernels do not support of this block, as the end of a sentence."""
        if config.expert_granularity == "linear":
            return None
        parts, act = self.parts, self.parts.act
        name = act.name or type(act.act).__name__
        return unsupported(parts.gated, name, num_experts, config.top_k, r, parts.hidden_dropout() > 0)

    def _experts(self, projection: str, adapter_name: str) -> LoraExperts:
        return cast(LoraExperts, getattr(self, f"graphlora_{projection}")[adapter_name])

    def _build_router(self, config: GraphLoraConfig, num_experts: int) -> CenteredRouter:
        d = self.parts.hidden_size
        if config.router_type == "linear":
            return self._linear_router(config, d, num_experts)
        options = self._router_options(config)
        edges = config.edges if config.edges is not None else config.edge_init
        adjacency = build_adjacency(num_experts, edges, config.edge_density, options["seed"])
        return GraphRouter(
            d,
            num_experts,
            width=config.router_hidden_size,
            num_layers=config.router_num_layers,
            act=self.parts.act,
            adjacency=adjacency,
            conv=config.router_conv,
            expert_features=config.expert_features,
            self_term=config.router_self_term,
            self_term_weight=config.router_self_term_weight,
            input_gain=config.router_input_gain,
            edge_density=config.edge_density,
            learned_edges=config.edge_init == "learned" and config.edges is None,
            **options,
        )

    def twins(self, adapter_name: str) -> list[tuple[int, int]]:
        """Pairs of experts that the router can never tell apart (graph router without a self term)."""
        router = self.router(adapter_name)
        if not isinstance(router, GraphRouter) or router.residual or router.has_self_weight:
            return []
        if router.edge_logits is not None or router.adjacency.is_meta:
            return []
        return twin_experts(router.adjacency)

    def forward(self, hidden_states: Tensor, *args: Any, **kwargs: Any) -> Tensor:
        """Adapted output of the block, same shape and dtype as the base block's.

        Args:
            hidden_states: `[..., d]`.
            *args: passed to the base block where no adapter is active.
            **kwargs: likewise.
        """
        name = self.active_name(self.graphlora_up_proj)
        if name is None:
            return self.base_layer(hidden_states, *args, **kwargs)
        config = self.configs[name]
        x = hidden_states.reshape(-1, hidden_states.shape[-1])
        backend = _resolve_backend(config.backend, x.device.type, self.unsupported[name])
        if self._may_decode(x, config, backend):
            weights, selection = self._expert_weights(name), (config.top_k, config.norm_topk_prob)
            out, routing = moe_ffn_decode(
                x, self.ffn, weights, self.router(name), selection, self.scaling[name]
            )
            self.recorder.add(self, routing)
            return out.view(hidden_states.shape)
        experts = self._expert_weights(name)
        dropout = config.lora_dropout if self.training else 0.0
        matrices = None
        if backend == "triton" and config.expert_granularity == "ffn" and not dropout:
            matrices = low_rank_matrices(experts, x)
        # The router sees the token as it comes, before autocast rounds it.
        routing, x, low = self.router(name).route_tokens(
            x, backend, config.top_k, config.norm_topk_prob, matrices
        )
        self.recorder.add(self, routing)
        if torch.is_autocast_enabled(x.device.type):
            x = x.to(torch.get_autocast_dtype(x.device.type))
        settings = MoeSettings(
            granularity=config.expert_granularity,
            scaling=self.scaling[name],
            lora_dropout=dropout,
            hidden_dropout=self.parts.hidden_dropout() if self.training else 0.0,
            backend=backend,
            recompute_gate_up=config.recompute_gate_up,
        )
        out = moe_ffn(x, self.ffn, experts, routing, settings, low)
        out = nn.functional.dropout(out, self.parts.output_dropout(), self.training)
        return out.view(hidden_states.shape)

    def _may_decode(self, x: Tensor, config: GraphLoraConfig, backend: str) -> bool:
        if backend != "triton" or self.training or config.expert_granularity != "ffn":
            return False
        return few_tokens(x) and config.top_k <= _DECODE_TOP_K

    def _expert_weights(self, name: str) -> ExpertWeights:
        gate_A, gate_B = self._experts("gate_proj", name)() if self.parts.gated else (None, None)
        up_A, up_B = self._experts("up_proj", name)()
        down_A, down_B = self._experts("down_proj", name)()
        return ExpertWeights(gate_A, gate_B, up_A, up_B, down_A, down_B)


class LoraPair(nn.Module):
    """Low-rank pair of one attention projection: `lora_A` `[r, in]` Kaiming uniform, `lora_B` `[out, r]` zero."""

    def __init__(self, in_features: int, out_features: int, r: int) -> None:
        super().__init__()
        self.lora_A = nn.Parameter(torch.empty(r, in_features))
        self.lora_B = nn.Parameter(torch.zeros(out_features, r))
        nn.init.kaiming_uniform_(self.lora_A, a=5**0.5)

    def forward(self) -> tuple[Tensor, Tensor]:
        """`(lora_A, lora_B)`; a call, so that hooks which keep weights elsewhere (offloading) bring them in."""
        return self.lora_A, self.lora_B


class GraphLoraLinear(TunerLayer):
    """An attention projection with plain LoRA; float32 weights, computed in the dtype of the input.

    Args:
        base_layer: the frozen linear layer, quantized or not.
        block_name: its name in the model.

    Attributes:
        shared_input: the projections that may read the same tensor, this one among them.
    """

    adapter_layer_names = ("graphlora_attention",)
    other_param_names = ()

    def __init__(self, base_layer: nn.Module, block_name: str) -> None:
        super().__init__(base_layer, block_name)
        self.in_features, self.out_features = features(base_layer)
        self.graphlora_attention = nn.ModuleDict()
        self.shared_input = SharedInput([self])

    def update_layer(self, adapter_name: str, config: GraphLoraConfig, inference_mode: bool = False) -> None:
        """Adds an adapter to this projection."""
        r = from_pattern(config.rank_pattern, self.block_name, config.r)
        alpha = from_pattern(config.alpha_pattern, self.block_name, config.lora_alpha)
        self.graphlora_attention[adapter_name] = LoraPair(self.in_features, self.out_features, r)
        self.configs[adapter_name] = config
        self.scaling[adapter_name] = alpha / r
        self._move_adapter_to_device_of_base_layer(adapter_name)
        self.set_adapter(self.active_adapters, inference_mode=inference_mode)

    def forward(self, x: Tensor, *args: Any, **kwargs: Any) -> Tensor:
        """`W x + s B A dropout(x)`."""
        name = self.active_name(self.graphlora_attention)
        if name is None:
            return self.base_layer(x, *args, **kwargs)
        out = self.shared_input.collect(self, x)
        if out is not None:
            return out
        found = self.adapted_matrix(x)
        if found is not None:
            return self.shared_input.compute(self, x, found)
        lora_A, lora_B = self._pair(name)
        scaling, dropout = self.scaling[name], self._dropout(name)
        if not args and not kwargs and self._decodes(name, x):
            return lora_linears_decode(x, [self.base_layer], [lora_A], [lora_B], scaling)[0]
        result = self.base_layer(x, *args, **kwargs)
        if dropout and self._drops_in_kernels(name, x):
            return add_low_rank(result, x, lora_A, lora_B, scaling, dropout)
        x = nn.functional.dropout(x, dropout) if dropout else x
        return add_low_rank(result, x, lora_A, lora_B, scaling)

    def adapted_matrix(self, x: Tensor) -> Adapted | None:
        """What calling this on `x` computes; None where it is more than a matrix and its pair."""
        name = self.active_name(self.graphlora_attention)
        matrix = None if name is None else plain_matrix(self.base_layer, x)
        if name is None or matrix is None:
            return None
        dropout = self._dropout(name)
        if dropout and not self._drops_in_kernels(name, x):
            return None
        decodes = self._decodes(name, x)
        return Adapted(AdaptedMatrix(*matrix, *self._pair(name)), self.scaling[name], dropout, decodes)

    def _pair(self, name: str) -> tuple[Tensor, Tensor]:
        return cast(LoraPair, self.graphlora_attention[name])()

    def _decodes(self, name: str, x: Tensor) -> bool:
        if self.training or not few_tokens(x):
            return False
        return _resolve_backend(self.configs[name].backend, x.device.type) == "triton"

    def _dropout(self, name: str) -> float:
        return self.configs[name].lora_dropout if self.training else 0.0

    def _drops_in_kernels(self, name: str, x: Tensor) -> bool:
        if x.dtype not in (torch.float32, torch.float16, torch.bfloat16):
            return False
        return _resolve_backend(self.configs[name].backend, x.device.type) == "triton"
