"""One FFN block of a shape, and every way to run it, all on the same frozen weights and the same routing."""

from __future__ import annotations

import copy
from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Any, cast
from unittest import mock

import torch
from peft import LoraConfig, get_peft_model
from torch import Tensor, nn
from transformers import LlamaConfig
from transformers.models.llama.modeling_llama import LlamaMLP

import graphlora.moe
from benchmarks.candidates.expanded import expanded_ffn
from benchmarks.candidates.fused_lora import FusedLoraFfn
from benchmarks.candidates.loop import loop_ffn
from benchmarks.candidates.routing import random_routing
from benchmarks.shapes import Shape
from graphlora import GraphLoraConfig
from graphlora.benchmark.random_model import twin, wake
from graphlora.moe import MoeSettings, moe_ffn
from graphlora.tuner.layer import GraphLoraLayer

NUM_EXPERTS, TOP_K, ALPHA, DROPOUT = 8, 2, 16.0, 0.05
PROJECTIONS = ["gate_proj", "up_proj", "down_proj"]
BACKENDS = ("triton", "torch", "eager")


class Block(nn.Module):
    """A module that holds one FFN block under the name that adapters look for."""

    def __init__(self, mlp: nn.Module) -> None:
        super().__init__()
        self.mlp = mlp

    def forward(self, x: Tensor) -> Tensor:
        """Output of the block."""
        return self.mlp(x)


@dataclass(frozen=True)
class FfnCandidate:
    """A way to run the block.

    Attributes:
        forward: `[tokens, d] -> [tokens, d]`.
        inputs: what wants gradients besides x: adapter weights and routing weights.
        names: what the inputs are called, for comparisons.
    """

    forward: Callable[[Tensor], Tensor]
    inputs: tuple[Tensor, ...]
    names: tuple[str, ...]

    def gradients(self, x: Tensor, dy: Tensor) -> tuple[Tensor, ...]:
        """Output, gradient of x, gradients of the inputs."""
        y = self.forward(x)
        return (y, *torch.autograd.grad(y, (x, *self.inputs), dy))


class FfnBench:
    """The block with random weights, its routing, and the input of a measurement.

    Args:
        shape: d and f.
        r: rank.
        tokens: rows of the input.
        skew: see `random_routing`.
        device: where it runs.
        dtype: of the frozen weights and the input.
        seed: of everything random.
    """

    def __init__(
        self,
        shape: Shape,
        r: int,
        tokens: int,
        skew: str,
        device: torch.device,
        dtype: torch.dtype,
        seed: int = 0,
    ) -> None:
        torch.manual_seed(seed)
        self.shape, self.r, self.device, self.dtype = shape, r, device, dtype
        d, f = shape.hidden_size, shape.intermediate_size
        with torch.device(device):
            mlp = LlamaMLP(LlamaConfig(hidden_size=d, intermediate_size=f, num_attention_heads=1))
        self.mlp = mlp.to(dtype).requires_grad_(False)
        for weight in self.mlp.parameters():
            nn.init.normal_(weight, std=weight.shape[1] ** -0.5)
        self.x = torch.randn(tokens, d, device=device).to(dtype).requires_grad_()
        self.dy = torch.randn(tokens, d, device=device).to(dtype)
        self.routing = random_routing(tokens, NUM_EXPERTS, TOP_K, skew, device, seed)
        self._layer: GraphLoraLayer | None = None

    @property
    def frozen_weights(self) -> tuple[Tensor, Tensor, Tensor]:
        """Weights of gate, up and down."""
        return tuple(cast(nn.Linear, getattr(self.mlp, name)).weight for name in PROJECTIONS)  # pyright: ignore[reportReturnType]

    @property
    def layer(self) -> GraphLoraLayer:
        """The block with a GraphLoRA adapter: float32 weights that bfloat16 holds exactly."""
        if self._layer is None:
            config = GraphLoraConfig(
                r=self.r, lora_alpha=ALPHA, num_experts=NUM_EXPERTS, top_k=TOP_K,
                target_modules=["mlp"], attention_target_modules=[],
            )  # fmt: skip
            model = get_peft_model(cast(Any, Block(twin(self.mlp))), config)
            wake(model, scale=0.05)
            round_to_bfloat16(model)
            self._layer = next(m for m in model.modules() if isinstance(m, GraphLoraLayer))
            self._wrapper = model.train()
        return self._layer

    def candidate(self, name: str) -> FfnCandidate:
        """A way to run the block, by the name that the registry gives it.

        Raises:
            KeyError: an unknown name.
        """
        if name == "frozen":
            return FfnCandidate(self.mlp, (), ())
        if name.startswith("peft_"):
            return self._peft("float32" in name, DROPOUT if name.endswith("_dropout") else 0.0)
        if name == "fused_lora":
            return self._fused_lora()
        if name.endswith("_layer"):
            return self._whole_layer(name.removesuffix("_layer"))
        return self._routed(name)

    def _peft(self, float32: bool, dropout: float) -> FfnCandidate:
        config = LoraConfig(r=self.r, lora_alpha=int(ALPHA), lora_dropout=dropout, target_modules=PROJECTIONS)
        model = get_peft_model(cast(Any, Block(twin(self.mlp))), config, autocast_adapter_dtype=float32)
        wake(model, scale=0.05)
        round_to_bfloat16(model)
        trained = [(n, p) for n, p in model.named_parameters() if p.requires_grad]
        return FfnCandidate(
            model.train(), tuple(p for _, p in trained), tuple(_short_name(n) for n, _ in trained)
        )

    def _fused_lora(self) -> FfnCandidate:
        """Plain LoRA in the dtype of the base, saving as little as it can."""
        pairs = []
        for name in PROJECTIONS:
            out, inner = cast(nn.Linear, getattr(self.mlp, name)).weight.shape
            pairs.append(torch.randn(self.r, inner, device=self.device, dtype=self.dtype).mul_(inner**-0.5))
            pairs.append(torch.randn(out, self.r, device=self.device, dtype=self.dtype).mul_(0.05))
        leaves = tuple(p.requires_grad_() for p in pairs)
        frozen, scaling = self.frozen_weights, ALPHA / self.r

        def forward(x: Tensor) -> Tensor:
            return cast(Tensor, FusedLoraFfn.apply(x, frozen, scaling, *leaves))

        return FfnCandidate(forward, leaves, tuple(f"{name}_{m}" for name in PROJECTIONS for m in "AB"))

    def _whole_layer(self, backend: str) -> FfnCandidate:
        """The adapted block as a model runs it, its own router included."""
        layer = self.layer
        trained = [(n, p) for n, p in layer.named_parameters() if p.requires_grad and "coordination" not in n]

        def forward(x: Tensor) -> Tensor:
            # All candidates share the layer, so each says anew how it is to run.
            layer.configs["default"].backend = cast(Any, backend)
            return layer(x)

        return FfnCandidate(forward, tuple(p for _, p in trained), tuple(n for n, _ in trained))

    def _routed(self, name: str) -> FfnCandidate:
        base_name, _, way = name.partition("_")
        if base_name not in (*BACKENDS, "loop", "expanded"):
            raise KeyError(name)
        layer, routing = self.layer, self.routing
        experts = layer._expert_weights("default")
        scaling = layer.scaling["default"]
        settings = MoeSettings(
            "ffn",
            scaling,
            lora_dropout=DROPOUT if way == "dropout" else 0.0,
            hidden_dropout=0.0,
            backend=base_name if base_name in BACKENDS else "eager",
            recompute_gate_up=way == "recompute",
        )
        frozen, ffn = self.frozen_weights, layer.ffn
        if way == "joined":
            # Of its own, because all candidates share the weights of the block.
            pair = cast(tuple[Tensor, Tensor], torch.cat(frozen[:2]).chunk(2))
            ffn = replace(ffn, plain_weights=lambda x: pair)

        def run(x: Tensor) -> Tensor:
            return moe_ffn(x, ffn, experts, routing, settings)

        def run_loop(x: Tensor) -> Tensor:
            with mock.patch.object(graphlora.moe, "expert_ffn_eager", loop_ffn):
                return run(x)

        def run_expanded(x: Tensor) -> Tensor:
            cast_experts = experts.to(x.dtype)
            return expanded_ffn(x, frozen, cast_experts, routing.top_k_weights, routing.top_k_index, scaling)

        forward = {"loop": run_loop, "expanded": run_expanded}.get(base_name, run)
        if way == "compiled":
            forward = torch.compile(forward, dynamic=False, backend=compiler_of(self.device))
        inputs = (*(t for t in experts if t is not None), routing.top_k_weights)
        return FfnCandidate(forward, inputs, (*(f"{p}_{m}" for p in PROJECTIONS for m in "AB"), "weights"))

    def in_double(self) -> FfnBench:
        """The same block, adapter, routing and input in float64."""
        other = object.__new__(FfnBench)
        other.__dict__.update(self.__dict__)
        _ = self.layer
        other.mlp = _double(self.mlp)
        other.dtype = torch.float64
        other.x = self.x.detach().double().requires_grad_()
        other.dy = self.dy.double()
        weights = self.routing.top_k_weights.detach().double().requires_grad_()
        other.routing = replace(self.routing, top_k_weights=weights)
        other._wrapper = _double(self._wrapper)
        other._layer = next(m for m in other._wrapper.modules() if isinstance(m, GraphLoraLayer))
        return other


def compiler_of(device: torch.device) -> str:
    """Compiler of `torch.compile`: on a CPU, where only the runner is tried, one that needs no C++ compiler."""
    return "inductor" if device.type == "cuda" else "aot_eager"


def _double(module: nn.Module) -> Any:
    return copy.deepcopy(module).double()


def round_to_bfloat16(model: nn.Module) -> None:
    """Rounds the trained weights to numbers that bfloat16 holds, so that computing in it starts without an error."""
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.requires_grad:
                parameter.copy_(parameter.bfloat16())


def _short_name(name: str) -> str:
    projection = next(p for p in PROJECTIONS if p in name)
    return f"{projection}_{'A' if 'lora_A' in name else 'B'}"
