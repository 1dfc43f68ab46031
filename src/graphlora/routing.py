"""What all routers share: the decision about a token, state that stays float32, logits centered by a running mean."""

from __future__ import annotations

import math
from abc import ABC, abstractmethod
from collections import defaultdict
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple, cast

import torch
from torch import Tensor, nn
from torch.optim.optimizer import register_optimizer_step_post_hook

_aten = torch.ops.aten
# Tokens of unit RMS that stand for the model's hidden states when a router is first scaled and centered.
_CALIBRATION_TOKENS = 512
# Optimizer steps that the running mean of the logits looks back on. A longer memory lags behind a router that Adam
# moves fast, and lets experts die (docs/deviations.md has the measurement).
_MEAN_HORIZON = 3


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


class RoutedTokens(NamedTuple):
    """A routing, and the tokens that it is of, for the block's own products with them.

    Attributes:
        routing: the routing.
        x: the tokens, `[tokens, d]`. What is computed from these, and not from the router's input, gives its gradient
            to the router's backward, which adds it to its own.
        low: the tokens times the block's matrices, `[tokens, rows]`, where the router made that product too.
    """

    routing: Routing
    x: Tensor
    low: Tensor | None


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
        self,
        x: Tensor,
        backend: str = "torch",
        selection: tuple[int, bool] | None = None,
        matrices: tuple[Tensor, Tensor] | None = None,
    ) -> Tensor | RoutedTokens:
        """Router logits `[tokens, num_experts]` (float32) of tokens `[tokens, d]`; with a `selection`, see `route`."""
        with torch.autocast(x.device.type, enabled=False):
            if selection is not None and backend == "triton":
                fused = self.fused_routing(x, *selection, matrices)
                if fused is not None:
                    return fused
            logits = self.raw_logits(x, backend)
            logits = logits - self.logit_offset if self.centering else logits
            return logits if selection is None else RoutedTokens(self.select(x, logits, *selection), x, None)

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
        return self.route_tokens(x, backend, top_k, norm_topk_prob).routing

    def route_tokens(
        self,
        x: Tensor,
        backend: str,
        top_k: int,
        norm_topk_prob: bool = True,
        matrices: tuple[Tensor, Tensor] | None = None,
    ) -> RoutedTokens:
        """`route`, for a block that has its own products with the same tokens.

        Args:
            x: see `route`.
            backend: likewise.
            top_k: likewise.
            norm_topk_prob: likewise.
            matrices: two of one size, `[..., d]`, which a fused router multiplies the tokens with beside its own
                projection; other routers leave that to the caller.
        """
        # A call of the module, so that hooks which keep weights elsewhere (offloading) bring them in.
        return cast(RoutedTokens, self(x, backend, (top_k, norm_topk_prob), matrices))

    def fused_routing(
        self, x: Tensor, top_k: int, norm_topk_prob: bool, matrices: tuple[Tensor, Tensor] | None
    ) -> RoutedTokens | None:
        """What `route_tokens` returns, from one fused operation; None for a router that has none."""
        del x, top_k, norm_topk_prob, matrices
        return None

    def begin_update(self) -> None:
        """Takes the tokens of the last optimizer step into `logit_offset`; called before every training forward."""
        begin_updates([self])

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
        _aten._foreach_copy_.default([router.logit_offset for router in group], list(offset.unbind()))
        _aten._foreach_add_.List([router.num_updates for router in group], list(some.unbind()))
        _aten._foreach_zero_.default([t for router in group for t in (router.logit_sum, router.logit_count)])


@torch.no_grad()
def collect_logits(routers: Sequence[CenteredRouter], sums: Sequence[Tensor]) -> None:
    """Remembers the logits of one training forward for the next update, in a few kernels whatever their number.

    Args:
        routers: each once.
        sums: by router, sum of the centered logits over all ranks' real tokens, followed by the number of those tokens:
            `[num_experts + 1]`.
    """
    groups: dict[tuple[int, torch.device], list[tuple[CenteredRouter, Tensor]]] = defaultdict(list)
    for router, of_router in zip(routers, sums, strict=True):
        if router.centering:
            groups[(router.num_experts, router.logit_offset.device)].append((router, of_router))
    for (num_experts, device), pairs in groups.items():
        group = [router for router, _ in pairs]
        centered, count = torch.stack([t for _, t in pairs]).to(device).split([num_experts, 1], dim=1)
        raw = centered + count * torch.stack([router.logit_offset for router in group])
        _aten._foreach_add_.List([router.logit_sum for router in group], list(raw.unbind()))
        _aten._foreach_add_.List([router.logit_count for router in group], list(count[:, 0].unbind()))
