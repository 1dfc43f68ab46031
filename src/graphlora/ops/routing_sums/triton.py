"""The sums over tokens in two kernels, one per direction, for all blocks at once.

Probabilities are not sorted: a probability's rank, the number of larger ones, says which entry of the target it meets.
"""

from __future__ import annotations

from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from graphlora.ops.operations import launches_kernels
from graphlora.ops.routing_sums.reference import RoutingSums
from graphlora.ops.sizes import ceil_div, next_power_of_2

# Tokens of one program, at most.
_TOKENS = 256
_library = torch.library.Library("graphlora", "FRAGMENT")


@triton.jit
def _rank(prob, n, N):
    """How many experts of the token are more probable `[BT, NP]`; among equals the lower index comes first."""
    mine, other = prob[:, :, None], prob[:, None, :]
    before = (other > mine) | ((other == mine) & (n[None, None, :] < n[None, :, None]))
    return tl.sum((before & (n < N)[None, None, :]).to(tl.int32), axis=2)


@triton.jit
def sums_kernel(
    logits, probs, weights, index, mask, log_target, partial, T, N, eps, tokens_per_program,
    BT: tl.constexpr, NP: tl.constexpr, K: tl.constexpr, ABSOLUTE: tl.constexpr, COUNT_PROBS: tl.constexpr,
    MASKED: tl.constexpr,
):  # fmt: skip
    """`partial` is `[L, programs, 4 N + 1]`: load, logits, divergence and its slope in log_target, and the count."""
    block, layer = tl.program_id(0), tl.program_id(1)
    n = tl.arange(0, NP)
    load = tl.zeros((NP,), tl.float32)
    logit = tl.zeros((NP,), tl.float32)
    divergence = tl.zeros((NP,), tl.float32)
    slopes = tl.zeros((NP,), tl.float32)
    count = 0.0
    probs += layer.to(tl.int64) * T * N
    logits += layer.to(tl.int64) * T * N
    weights += layer.to(tl.int64) * T * K
    index += layer.to(tl.int64) * T * K
    for start in range(0, tokens_per_program, BT):
        t = block * tokens_per_program + start + tl.arange(0, BT)
        flag = tl.where(t < T, 1.0, 0.0)
        if MASKED:
            flag = tl.load(mask + t, mask=t < T, other=0.0).to(tl.float32)
        at = t[:, None] * N + n[None, :]
        live = (t < T)[:, None] & (n < N)[None, :]
        prob = tl.load(probs + at, mask=live, other=0.0)
        count += tl.sum(flag, axis=0)
        logit += tl.sum(tl.load(logits + at, mask=live, other=0.0) * flag[:, None], axis=0)
        for i in tl.static_range(K):
            chosen = tl.load(index + t * K + i, mask=t < T, other=-1)[:, None] == n[None, :]
            given = tl.load(weights + t * K + i, mask=t < T, other=0.0)[:, None]
            weight = K * prob if COUNT_PROBS else given
            load += tl.sum(tl.where(chosen, weight * flag[:, None], 0.0), axis=0)
        rank = _rank(prob, n, N)
        target = tl.load(log_target + layer * N + rank, mask=live, other=0.0)
        if ABSOLUTE:
            distance = target - tl.log(prob + eps)
            sign = tl.where(distance > 0, 1.0, tl.where(distance < 0, -1.0, 0.0))
            distance = tl.abs(distance)
        else:
            distance = target - tl.log(tl.maximum(prob, eps))
            sign = tl.full((BT, NP), 1.0, tl.float32)
        counted = tl.where(live, flag[:, None], 0.0)
        here = rank[:, :, None] == n[None, None, :]
        divergence += tl.sum(tl.sum(tl.where(here, (distance * counted)[:, :, None], 0.0), axis=1), axis=0)
        slopes += tl.sum(tl.sum(tl.where(here, (sign * counted)[:, :, None], 0.0), axis=1), axis=0)
    own = partial + (layer * tl.num_programs(0) + block) * (4 * N + 1)
    tl.store(own + n, load, mask=n < N)
    tl.store(own + N + n, logit, mask=n < N)
    tl.store(own + 2 * N + n, divergence, mask=n < N)
    tl.store(own + 3 * N + n, slopes, mask=n < N)
    tl.store(own + 4 * N, count)


@triton.jit
def sums_backward_kernel(
    probs, index, mask, log_target, grad_load, grad_divergence, grad_probs, grad_weights, T, N, eps,
    BT: tl.constexpr, NP: tl.constexpr, K: tl.constexpr, ABSOLUTE: tl.constexpr, COUNT_PROBS: tl.constexpr,
    MASKED: tl.constexpr,
):  # fmt: skip
    """Gradients of probabilities `[L, T, N]` and weights `[L, T, K]`."""
    layer = tl.program_id(1)
    n = tl.arange(0, NP)
    t = tl.program_id(0) * BT + tl.arange(0, BT)
    first = layer.to(tl.int64) * T
    flag = tl.where(t < T, 1.0, 0.0)
    if MASKED:
        flag = tl.load(mask + t, mask=t < T, other=0.0).to(tl.float32)
    at = t[:, None] * N + n[None, :]
    live = (t < T)[:, None] & (n < N)[None, :]
    prob = tl.load(probs + first * N + at, mask=live, other=0.0)
    rank = _rank(prob, n, N)
    grad = -tl.load(grad_divergence + layer * N + rank, mask=live, other=0.0)
    if ABSOLUTE:
        target = tl.load(log_target + layer * N + rank, mask=live, other=0.0)
        distance = target - tl.log(prob + eps)
        grad *= tl.where(distance > 0, 1.0, tl.where(distance < 0, -1.0, 0.0)) / (prob + eps)
    else:
        grad = tl.where(prob >= eps, grad / tl.maximum(prob, eps), 0.0)
    own_load = tl.load(grad_load + layer * N + n, mask=n < N, other=0.0)
    for i in tl.static_range(K):
        chosen = tl.load(index + first * K + t * K + i, mask=t < T, other=-1)
        here = chosen[:, None] == n[None, :]
        if COUNT_PROBS:
            grad += tl.where(here, K * own_load[None, :], 0.0)
        else:
            taken = tl.sum(tl.where(here, own_load[None, :], 0.0), axis=1)
            tl.store(grad_weights + first * K + t * K + i, taken * flag, mask=t < T)
    tl.store(grad_probs + first * N + at, grad * flag[:, None], mask=live)


def routing_sums_triton(
    logits: Tensor,
    probs: Tensor,
    weights: Tensor,
    index: Tensor,
    mask: Tensor | None,
    log_target: Tensor,
    *,
    absolute: bool,
    eps: float,
    count_probs: bool,
) -> RoutingSums:
    """Same function as `routing_sums_torch`."""
    settings = (absolute, eps, count_probs)
    return RoutingSums(*_Sums.apply(logits.detach(), probs, weights, index, mask, log_target, *settings))


class _Sums(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any, logits: Tensor, probs: Tensor, weights: Tensor, index: Tensor, mask: Tensor | None,
        log_target: Tensor, absolute: bool, eps: float, count_probs: bool,
    ) -> tuple[Tensor, Tensor, Tensor, Tensor]:  # fmt: skip
        """See `routing_sums_torch`."""
        probs, index = probs.contiguous(), index.contiguous()
        summed = torch.ops.graphlora.routing_sums(
            logits.contiguous(), probs, weights.contiguous(), index, mask, log_target.contiguous(),
            absolute, eps, count_probs,
        )  # fmt: skip
        size = probs.shape[2]
        load, logit, divergence, slopes = summed[:, :-1].split(size, dim=1)
        count = summed[:, -1].contiguous()
        ctx.save_for_backward(probs, index, mask, log_target, slopes)
        ctx.settings = (absolute, eps, count_probs)
        logit = logit.contiguous()
        ctx.mark_non_differentiable(logit, count)
        ctx.set_materialize_grads(False)
        return load.contiguous(), logit, count, divergence.contiguous()

    @staticmethod
    def backward(ctx: Any, *grad_outputs: Tensor | None) -> tuple[Tensor | None, ...]:
        """Gradients of probabilities, weights and log_target; a loss may leave out load or divergence."""
        grad_load, _, _, grad_divergence = grad_outputs
        if grad_load is None and grad_divergence is None:
            return (None,) * 9
        probs, index, mask, log_target, slopes = ctx.saved_tensors
        of_load, of_divergence = (
            torch.zeros_like(slopes) if t is None else t.contiguous() for t in (grad_load, grad_divergence)
        )
        grad_probs, grad_weights = torch.ops.graphlora.routing_sums_backward(
            probs,
            index,
            mask,
            log_target.contiguous(),
            of_load.contiguous(),
            of_divergence.contiguous(),
            *ctx.settings,
        )
        of_weights = None if ctx.settings[2] or grad_load is None else grad_weights
        of_target = None if grad_divergence is None else grad_divergence * slopes
        return None, grad_probs, of_weights, None, None, of_target, None, None, None


def _token_block(num_experts: int) -> int:
    """Tokens whose pairs of experts are compared at once."""
    return max(1, 2048 // next_power_of_2(num_experts) ** 2)


def _constants(
    index: Tensor, num_experts: int, mask: Tensor | None, absolute: bool, count_probs: bool
) -> dict[str, Any]:
    return {
        "BT": _token_block(num_experts), "NP": next_power_of_2(num_experts), "K": index.shape[2],
        "ABSOLUTE": absolute, "COUNT_PROBS": count_probs, "MASKED": mask is not None, "num_warps": 4,
    }  # fmt: skip


@launches_kernels
def _forward(
    logits: Tensor, probs: Tensor, weights: Tensor, index: Tensor, mask: Tensor | None, log_target: Tensor,
    absolute: bool, eps: float, count_probs: bool,
) -> Tensor:  # fmt: skip
    num_layers, tokens, num_experts = probs.shape
    if tokens == 0:
        return probs.new_zeros(num_layers, 4 * num_experts + 1)
    per_program = max(_token_block(num_experts), min(_TOKENS, next_power_of_2(tokens)))
    programs = ceil_div(tokens, per_program)
    partial = probs.new_empty(num_layers, programs, 4 * num_experts + 1)
    sums_kernel[(programs, num_layers)](
        logits, probs, weights, index, probs if mask is None else mask.to(torch.float32), log_target, partial,
        tokens, num_experts, eps, per_program, **_constants(index, num_experts, mask, absolute, count_probs),
    )  # fmt: skip
    return partial.sum(dim=1)


@launches_kernels
def _backward(
    probs: Tensor, index: Tensor, mask: Tensor | None, log_target: Tensor, grad_load: Tensor,
    grad_divergence: Tensor, absolute: bool, eps: float, count_probs: bool,
) -> tuple[Tensor, Tensor]:  # fmt: skip
    num_layers, tokens, num_experts = probs.shape
    grad_probs = torch.empty_like(probs)
    grad_weights = probs.new_empty(0 if count_probs else index.shape)
    if tokens:
        constants = _constants(index, num_experts, mask, absolute, count_probs)
        sums_backward_kernel[(ceil_div(tokens, constants["BT"]), num_layers)](
            probs, index, probs if mask is None else mask.to(torch.float32), log_target, grad_load, grad_divergence,
            grad_probs, grad_weights, tokens, num_experts, eps, **constants,
        )  # fmt: skip
    return grad_probs, grad_weights


_library.define(
    "routing_sums(Tensor logits, Tensor probs, Tensor weights, Tensor index, Tensor? mask, Tensor log_target, "
    "bool absolute, float eps, bool count_probs) -> Tensor"
)
_library.define(
    "routing_sums_backward(Tensor probs, Tensor index, Tensor? mask, Tensor log_target, Tensor grad_load, "
    "Tensor grad_divergence, bool absolute, float eps, bool count_probs) -> (Tensor, Tensor)"
)
for _device in ("CUDA", "CPU"):
    _library.impl("routing_sums", _forward, _device)
    _library.impl("routing_sums_backward", _backward, _device)
torch.library.register_fake(
    "graphlora::routing_sums",
    lambda logits, probs, *_: probs.new_empty(probs.shape[0], 4 * probs.shape[2] + 1),
)
torch.library.register_fake(
    "graphlora::routing_sums_backward",
    lambda probs, index, *rest: (torch.empty_like(probs), probs.new_empty(0 if rest[-1] else index.shape)),
)
