"""The routers (paper eq. 4 and section 4.1): which experts adapt each token, and with what weight."""

from __future__ import annotations

import math
from abc import ABC, abstractmethod
from collections import defaultdict
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, cast

import torch
from torch import Tensor, nn
from torch.optim.optimizer import register_optimizer_step_post_hook

from graphlora import graph
from graphlora.ops.expert_ffn.activations import DifferentiableAct
from graphlora.ops.graph_route import GraphWeights, graph_logits_eager, graph_logits_torch

if TYPE_CHECKING:
    from graphlora.ops.graph_route.triton import RouterWeights

Activation = Callable[[Tensor], Tensor]
_aten = torch.ops.aten
_RMS_EPS = 1e-6
# Tokens of unit RMS that stand for the model's hidden states when a router is first scaled and centered.
_CALIBRATION_TOKENS = 512
# Optimizer steps that the running mean of the logits looks back on. A longer memory lags behind a router that Adam
# moves fast, and lets experts die (docs/deviations.md has the measurement).
_MEAN_HORIZON = 3
# Standard deviation of a linear router's weights with `init="normal"`, as MixLoRA and most mixtures start.
_NORMAL_INIT = 0.02


class _OptimizerSteps:
    """Counts the optimizer steps of this process; versions of tensors would not do, fused optimizers skip them."""

    def __init__(self) -> None:
        self.count = 0
        register_optimizer_step_post_hook(self._after_step)

    def _after_step(self, *_: Any) -> None:
        self.count += 1


_steps = _OptimizerSteps()


@dataclass(frozen=True)
class Routing:
    """What one router decided for the tokens of one forward.

    Attributes:
        router_logits: `[tokens, num_experts]`, float32, before the softmax.
        router_probs: `[tokens, num_experts]`, float32, after the softmax.
        top_k_weights: `[tokens, top_k]`, float32, renormalized to sum to 1 where `norm_topk_prob` is set.
        top_k_index: `[tokens, top_k]`, int64, in descending order of probability; ties go to the lowest index.
    """

    router_logits: Tensor
    router_probs: Tensor
    top_k_weights: Tensor
    top_k_index: Tensor


def select_experts(router_logits: Tensor, top_k: int, norm_topk_prob: bool = True) -> Routing:
    """Softmax over the experts, the K largest, renormalized (paper eq. 5).

    Args:
        router_logits: `[tokens, num_experts]`.
        top_k: K.
        norm_topk_prob: divide the selected probabilities by their sum.
    """
    router_logits = router_logits.float()
    router_probs = router_logits.softmax(dim=-1)
    # A stable sort keeps the lower index first among equals; top-k promises nothing there.
    top_k_index = router_probs.detach().argsort(dim=-1, descending=True, stable=True)[:, :top_k]
    top_k_weights = router_probs.gather(1, top_k_index)
    if norm_topk_prob:
        top_k_weights = top_k_weights / top_k_weights.sum(dim=-1, keepdim=True)
    return Routing(router_logits, router_probs, top_k_weights, top_k_index)


def rms_normalize(x: Tensor, eps: float = _RMS_EPS) -> Tensor:
    """`x / rms(x)` over the last dimension, in float32."""
    x = x.float()
    return x * torch.rsqrt(x.square().mean(dim=-1, keepdim=True) + eps)


class Float32State(nn.Module):
    """A module whose named tensors stay float32 when the model is cast to another dtype."""

    float32_names: tuple[str, ...] = ()

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> Float32State:
        tensors = ((name, getattr(self, name, None)) for name in self.float32_names)
        kept = {name: tensor.detach() for name, tensor in tensors if tensor is not None}
        super()._apply(fn, recurse)
        for name, before in kept.items():
            after = getattr(self, name)
            if after.dtype == before.dtype:
                continue
            value = before.to(after.device)
            if isinstance(after, nn.Parameter):
                after.data = value
            else:
                setattr(self, name, value)
        return self


class CenteredRouter(Float32State, ABC):
    """Shared end of every router: logits centered by a running mean per expert.

    Without centering one expert's larger bias decides most tokens, whatever they are. The mean that is subtracted
    (`logit_offset`) moves once per optimizer step, between forwards, by what all forwards of that step have seen. So
    recomputing a block in backward gives the same routing, and so does cutting a batch into accumulated micro-batches.
    """

    float32_names: tuple[str, ...] = ("logit_offset", "logit_sum", "logit_count", "num_updates")
    logit_offset: Tensor
    logit_sum: Tensor
    logit_count: Tensor
    num_updates: Tensor

    def __init__(self, num_experts: int, centering: bool) -> None:
        super().__init__()
        self.num_experts = num_experts
        self.centering = centering
        if centering:
            self.register_buffer("logit_offset", torch.zeros(num_experts))
            self.register_buffer("logit_sum", torch.zeros(num_experts))
            self.register_buffer("logit_count", torch.zeros(()))
            self.register_buffer("num_updates", torch.zeros(()))
        self._seen_step: int | None = None

    @abstractmethod
    def raw_logits(self, x: Tensor, backend: str) -> Tensor:
        """Logits before centering, `[tokens, num_experts]`, float32; `x` is `[tokens, d]`."""

    def forward(
        self, x: Tensor, backend: str = "torch", selection: tuple[int, bool] | None = None
    ) -> Tensor | Routing:
        """Router logits `[tokens, num_experts]` (float32) of tokens `[tokens, d]`; with a `selection`, see `route`."""
        with torch.autocast(x.device.type, enabled=False):
            if selection is not None and backend == "triton":
                fused = self.fused_routing(x, *selection)
                if fused is not None:
                    return fused
            logits = self.raw_logits(x, backend)
            logits = logits - self.logit_offset if self.centering else logits
            return logits if selection is None else self.select(x, logits, *selection)

    def select(self, x: Tensor, router_logits: Tensor, top_k: int, norm_topk_prob: bool) -> Routing:
        """From the logits of tokens `x` to their experts; `graphlora.gates` has routers with other gates."""
        del x
        return select_experts(router_logits, top_k, norm_topk_prob)

    def route(self, x: Tensor, backend: str, top_k: int, norm_topk_prob: bool = True) -> Routing:
        """The experts of each token.

        Args:
            x: `[tokens, d]`.
            backend: `"eager"`, `"torch"` or `"triton"`; routers without a kernel take the PyTorch path.
            top_k: K.
            norm_topk_prob: divide the selected probabilities by their sum.
        """
        # A call of the module, so that hooks which keep weights elsewhere (offloading) bring them in.
        return cast(Routing, self(x, backend, (top_k, norm_topk_prob)))

    def fused_routing(self, x: Tensor, top_k: int, norm_topk_prob: bool) -> Routing | None:
        """What `route` returns, from one fused operation; None for a router that has none."""
        del x, top_k, norm_topk_prob
        return None

    def begin_update(self) -> None:
        """Takes the tokens of the last optimizer step into `logit_offset`; called before every training forward."""
        begin_updates([self])

    @torch.no_grad()
    def collect(self, centered_sum: Tensor, count: Tensor) -> None:
        """Remembers the logits of one training forward.

        Args:
            centered_sum: sum of the centered logits over all ranks' real tokens, `[num_experts]`.
            count: number of those tokens, scalar.
        """
        if self.centering:
            self.logit_sum += centered_sum + count * self.logit_offset
            self.logit_count += count

    @torch.no_grad()
    def calibrate(self, hidden_size: int, seed: int, spread: float) -> Tensor | None:
        """Centers the logits of random unit tokens; returns their standard deviation over tokens and experts.

        Returns None where nothing is computed: no centering, or weights on the meta device.
        """
        device = next(self.parameters()).device
        if not self.centering or device.type == "meta":
            return None
        generator = torch.Generator().manual_seed(seed)
        tokens = torch.randn(_CALIBRATION_TOKENS, hidden_size, generator=generator).to(device)
        logits = self.raw_logits(tokens, "torch")
        centered = logits - logits.mean(dim=0)
        scale = spread / centered.std().clamp_min(1e-12)
        if not math.isfinite(float(scale)) or float(centered.std()) < 1e-6:
            scale = torch.ones(())
        self._scale_output(scale)
        self.logit_offset.copy_(logits.mean(dim=0) * scale)
        return scale

    @abstractmethod
    def _scale_output(self, scale: Tensor) -> None:
        """Multiplies the logits by `scale`, in the weights."""


@torch.no_grad()
def begin_updates(routers: Iterable[CenteredRouter]) -> None:
    """`CenteredRouter.begin_update` of all blocks at once, in a few kernels whatever their number."""
    groups: dict[tuple[int, torch.device], list[CenteredRouter]] = defaultdict(list)
    for router in routers:
        if router.centering and router._seen_step != _steps.count:
            router._seen_step = _steps.count
            groups[(router.num_experts, router.logit_offset.device)].append(router)
    for group in groups.values():
        count = torch.stack([router.logit_count for router in group])
        some = (count > 0).float()
        updates = torch.stack([router.num_updates for router in group])
        weight = some * torch.clamp(1 / (updates + 1), min=1 / _MEAN_HORIZON)
        mean = torch.stack([router.logit_sum for router in group]) / count.clamp_min(1)[:, None]
        offset = torch.stack([router.logit_offset for router in group]).lerp_(mean, weight[:, None])
        _aten._foreach_copy_([router.logit_offset for router in group], list(offset.unbind()))
        _aten._foreach_add_([router.num_updates for router in group], list(some.unbind()))
        _aten._foreach_zero_([t for router in group for t in (router.logit_sum, router.logit_count)])


class LinearRouter(CenteredRouter):
    """`logits = W x` (+ b), the ablation without a graph and the router of the baselines.

    Args:
        hidden_size: d.
        num_experts: N.
        input_norm: RMS-normalize the token first.
        centering: see `CenteredRouter`.
        seed: seed of the calibration tokens.
        spread: standard deviation of the centered logits at initialization.
        bias: add a trained bias per expert, which starts at zero.
        init: `"kaiming"` (uniform, a = sqrt 5) or `"normal"` (standard deviation 0.02).
    """

    def __init__(
        self,
        hidden_size: int,
        num_experts: int,
        *,
        input_norm: bool,
        centering: bool,
        seed: int,
        spread: float,
        bias: bool = False,
        init: str = "kaiming",
    ) -> None:
        super().__init__(num_experts, centering)
        self.input_norm = input_norm
        self.weight = nn.Parameter(torch.empty(num_experts, hidden_size))
        if init == "normal":
            nn.init.normal_(self.weight, std=_NORMAL_INIT)
        else:
            nn.init.kaiming_uniform_(self.weight, a=math.sqrt(5))
        self.bias = nn.Parameter(torch.zeros(num_experts)) if bias else None
        self.calibrate(hidden_size, seed, spread)

    def raw_logits(self, x: Tensor, backend: str) -> Tensor:
        """See `CenteredRouter.raw_logits`."""
        del backend
        x = rms_normalize(x) if self.input_norm else x.float()
        logits = x @ self.weight.float().T
        return logits if self.bias is None else logits + self.bias.float()

    def _scale_output(self, scale: Tensor) -> None:
        self.weight.mul_(scale)


class GraphRouter(CenteredRouter):
    """A graph network over the N experts and the token scores the experts (paper eq. 4).

    Parameters are flat and stacked, so that an adapter file names them without nesting: `token_proj` (P_x, `[g, d]`),
    `expert_features` (`[N, g]` trained, or `[N, d]` frozen with `expert_proj`, P_e), `conv_weight` (`[L, g, g]`),
    `self_weight`, `attention`, `out_proj` (p, `[g]`), `edge_logits` (learned gates) and the buffer `adjacency`.

    Args:
        hidden_size: d.
        num_experts: N.
        width: g, the router's hidden size.
        num_layers: L.
        act: the model's FFN activation.
        adjacency: expert-expert block `[N, N]`, or None to build it from the similarity of the initial features.
        conv: `"gcn"`, `"sage"` or `"gat"`.
        expert_features: `"embedding"` or `"projected"`.
        self_term: `"none"`, `"residual"` or `"weight"`.
        self_term_weight: a of the residual form.
        input_gain: Glorot gain of P_x.
        input_norm: RMS-normalize the token first.
        edge_density: density of the similarity graph or of the learned gates.
        learned_edges: train a gate per expert pair, starting from `adjacency`.
        centering: see `CenteredRouter`.
        seed: seed of the calibration tokens.
        spread: standard deviation of the centered logits at initialization.
    """

    float32_names = (*CenteredRouter.float32_names, "adjacency", "edge_logits")
    adjacency: Tensor
    expert_features: Tensor

    def __init__(
        self,
        hidden_size: int,
        num_experts: int,
        *,
        width: int,
        num_layers: int,
        act: Activation,
        adjacency: Tensor | None,
        conv: str,
        expert_features: str,
        self_term: str,
        self_term_weight: float,
        input_gain: float,
        input_norm: bool,
        edge_density: float,
        learned_edges: bool,
        centering: bool,
        seed: int,
        spread: float,
    ) -> None:
        super().__init__(num_experts, centering)
        self.act, self.conv, self.input_norm = act, conv, input_norm
        self.act_name = (act if isinstance(act, DifferentiableAct) else DifferentiableAct(act)).name
        self.edge_density = edge_density
        self.residual = self_term_weight if self_term == "residual" and conv != "sage" else 0.0
        self.has_self_weight = conv == "sage" or self_term == "weight"
        self.projected = expert_features == "projected"
        self.token_proj = nn.Parameter(torch.empty(width, hidden_size))
        nn.init.xavier_uniform_(self.token_proj, gain=input_gain)
        if self.projected:
            features = torch.empty(num_experts, hidden_size)
            nn.init.xavier_uniform_(features)
            self.register_buffer("expert_features", features)
            self.expert_proj = nn.Parameter(torch.empty(width, hidden_size))
            nn.init.xavier_uniform_(self.expert_proj)
        else:
            self.expert_features = nn.Parameter(torch.randn(num_experts, width))
        self.conv_weight = _glorot(num_layers, width, width)
        self.self_weight = _glorot(num_layers, width, width) if self.has_self_weight else None
        self.attention = (
            nn.Parameter(torch.randn(num_layers, 2, width) / width**0.5) if conv == "gat" else None
        )
        self.out_proj = nn.Parameter(torch.empty(width))
        nn.init.uniform_(self.out_proj, -math.sqrt(6 / (width + 1)), math.sqrt(6 / (width + 1)))
        if adjacency is None:
            nodes = self.expert_nodes()
            edges = [] if nodes.is_meta else graph.similarity_edges(nodes, edge_density)
            adjacency = graph.adjacency_from_edges(num_experts, edges)
        self.register_buffer("adjacency", adjacency.to(self.out_proj.device))
        self.edge_logits = None
        if learned_edges:
            gates = graph.edge_gate_logits(adjacency.cpu(), edge_density) if not adjacency.is_meta else None
            pairs = num_experts * (num_experts - 1) // 2
            self.edge_logits = nn.Parameter(
                torch.empty(pairs) if gates is None else gates.to(self.out_proj.device)
            )
        self.calibrate(hidden_size, seed, spread)

    def _raw_expert_nodes(self) -> Tensor:
        features = self.expert_features.float()
        return features @ self.expert_proj.float().T if self.projected else features

    def expert_nodes(self) -> Tensor:
        """Expert node features E', `[num_experts, g]`, float32."""
        return self.act(self._raw_expert_nodes())

    def expert_adjacency(self) -> Tensor:
        """Adjacency in use, `[num_experts, num_experts]`: the stored graph, or the learned gates."""
        if self.edge_logits is None:
            return self.adjacency
        return graph.adjacency_from_gates(self.edge_logits, self.num_experts)

    def raw_logits(self, x: Tensor, backend: str) -> Tensor:
        """See `CenteredRouter.raw_logits`."""
        x = rms_normalize(x) if self.input_norm else x.float()
        token = self.act(x @ self.token_proj.float().T)
        adjacency = self.expert_adjacency()
        weights = GraphWeights(
            experts=self.expert_nodes(),
            conv=self.conv_weight.float(),
            self_weight=None if self.self_weight is None else self.self_weight.float(),
            attention=None if self.attention is None else self.attention.float(),
            out=self.out_proj.float(),
            adjacency=adjacency,
            normalized=graph.normalized_adjacency(adjacency),
            residual=self.residual,
        )
        if backend == "eager" or self.conv != "gcn":
            return graph_logits_eager(token, weights, self.act, self.conv)
        return graph_logits_torch(token, weights, self.act)

    def fused_routing(self, x: Tensor, top_k: int, norm_topk_prob: bool) -> Routing | None:
        """See `CenteredRouter.fused_routing`; None for another convolution, depth or activation, or a larger router."""
        from graphlora.ops.graph_route.triton import graph_route_triton

        weights = self.fused_weights(top_k)
        return None if weights is None else Routing(*graph_route_triton(x, weights, top_k, norm_topk_prob))

    def fused_weights(self, top_k: int) -> RouterWeights | None:
        """This router as `graphlora.ops.graph_route.triton` takes it; None where the kernels cannot run it."""
        from graphlora.ops.graph_route.triton import RouterWeights, supports

        num_layers, width, _ = self.conv_weight.shape
        if not supports(self.conv, num_layers, self.act_name, width, self.num_experts, top_k):
            return None
        # Fixed edges are normalized in the kernel.
        edges = (
            self.adjacency
            if self.edge_logits is None
            else graph.normalized_adjacency(self.expert_adjacency())
        )
        return RouterWeights(
            token_proj=self.token_proj,
            features=self._raw_expert_nodes(),
            conv=self.conv_weight,
            self_weight=self.self_weight,
            out=self.out_proj,
            graph=edges,
            logit_offset=self.logit_offset if self.centering else None,
            residual=self.residual,
            act=cast(str, self.act_name),
            eps=_RMS_EPS if self.input_norm else None,
        )

    def _scale_output(self, scale: Tensor) -> None:
        self.out_proj.mul_(scale)


def _glorot(*shape: int) -> nn.Parameter:
    weight = torch.empty(*shape)
    for matrix in weight:
        nn.init.xavier_uniform_(matrix)
    return nn.Parameter(weight)


def build_adjacency(num_experts: int, edge_init: Any, edge_density: float, seed: int) -> Tensor | None:
    """Initial expert-expert adjacency for a configured `edge_init`; None for `"similarity"`, which needs features.

    Args:
        num_experts: N.
        edge_init: `"random"`, `"ring"`, `"complete"`, `"none"`, `"learned"` (starts random), `"similarity"`, or a list
            of expert pairs.
        edge_density: share of joined pairs for the random graph.
        seed: seed of the random graph.
    """
    if edge_init == "similarity":
        return None
    if not isinstance(edge_init, str):
        return graph.adjacency_from_edges(num_experts, edge_init)
    edges = {
        "ring": lambda: graph.ring_edges(num_experts),
        "complete": lambda: graph.all_pairs(num_experts),
        "none": list,
    }.get(edge_init, lambda: graph.random_edges(num_experts, edge_density, seed))()
    return graph.adjacency_from_edges(num_experts, edges)
