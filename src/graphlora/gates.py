"""The gates of the other methods, from router logits to a `Routing`, and the linear routers that use them.

A gate that does not select a fixed number of experts gives a `Routing` over all of them, with weight zero where an
expert is not selected. MING-MoE's gate (the K largest logits, then a softmax over them) is
`graphlora.router.select_experts`: a softmax over the selected logits equals their renormalized probabilities.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from graphlora.losses import tsallis_entropy
from graphlora.router import LinearRouter, Routing, select_experts

# lam of LD-MoLE is at most this.
_LARGEST_SPARSITY = 0.99
_SPARSITY_BIAS = -2.5


@dataclass(frozen=True)
class SparsegenRouting(Routing):
    """A `Routing` with LD-MoLE's predicted sparsity.

    Attributes:
        sparsity: lam, `[tokens]`, float32, below 1.
    """

    sparsity: Tensor


def dense_gate(router_logits: Tensor) -> Routing:
    """`w = softmax(u)`, all experts (LoRAMoE, arXiv 2312.09979; HydraLoRA, arXiv 2404.19245).

    Args:
        router_logits: u, `[tokens, num_experts]`.
    """
    return select_experts(router_logits, router_logits.shape[-1], norm_topk_prob=False)


def top_p_gate(
    router_logits: Tensor, top_k: int, top_p: float, entropy_index: float, entropy_threshold: float
) -> Routing:
    """DynMoLE's gate (arXiv 2504.00661): as many experts as a token needs, with `pi = softmax(u)` as their weights.

    Selected are the fewest experts, in descending order, that have mass p together, and at least K; all of them where
    the Tsallis entropy of pi is over a threshold. The weights are not renormalized.

    Args:
        router_logits: u, `[tokens, num_experts]`.
        top_k: K.
        top_p: p.
        entropy_index: q of the Tsallis entropy.
        entropy_threshold: the threshold.
    """
    routing = dense_gate(router_logits)
    ordered = routing.top_k_weights
    mass_before = ordered.cumsum(dim=-1) - ordered
    keep = (mass_before < top_p) | (torch.arange(ordered.shape[1], device=ordered.device) < top_k)
    keep = keep | (tsallis_entropy(routing.router_probs, entropy_index) > entropy_threshold)[:, None]
    return Routing(routing.router_logits, routing.router_probs, ordered * keep, routing.top_k_index)


def sparsegen_gate(router_logits: Tensor, sparsity: Tensor) -> SparsegenRouting:
    """Sparsegen (LD-MoLE, arXiv 2509.25684): `pi_i = max(u_i - tau, 0) / (1 - lam)`, with tau so that they sum to 1.

    `tau = (sum_{j <= k} u_(j) - 1 + lam) / k` for the largest k with `1 - lam + k u_(k) > sum_{j <= k} u_(j)`, u_(j)
    the j-th largest logit. The larger lam, the fewer experts.

    Args:
        router_logits: u, `[tokens, num_experts]`.
        sparsity: lam, `[tokens]`, below 1.
    """
    u, lam = router_logits.float(), sparsity.float()[:, None]
    top_k_index = u.detach().argsort(dim=-1, descending=True, stable=True)
    ordered = u.gather(1, top_k_index)
    k = torch.arange(1, u.shape[1] + 1, device=u.device)
    total = ordered.cumsum(dim=-1)
    last = (1 - lam + k * ordered > total).sum(dim=-1, keepdim=True).clamp_min(1)
    tau = (total.gather(1, last - 1) - 1 + lam) / last
    weights = (ordered - tau).relu() / (1 - lam)
    probs = torch.zeros_like(u).scatter(1, top_k_index, weights)
    return SparsegenRouting(u, probs, weights, top_k_index, lam[:, 0])


class DenseRouter(LinearRouter):
    """A linear router with `dense_gate`."""

    def select(self, x: Tensor, router_logits: Tensor, top_k: int, norm_topk_prob: bool) -> Routing:
        """See `dense_gate`."""
        del x, top_k, norm_topk_prob
        return dense_gate(router_logits)


class TopPRouter(LinearRouter):
    """A linear router with `top_p_gate`.

    Args:
        hidden_size: d.
        num_experts: N.
        top_p: p.
        entropy_index: q of the Tsallis entropy.
        entropy_threshold: the entropy over which all experts are selected.
        **options: of `LinearRouter`.
    """

    def __init__(
        self,
        hidden_size: int,
        num_experts: int,
        *,
        top_p: float,
        entropy_index: float,
        entropy_threshold: float,
        **options: Any,
    ) -> None:
        super().__init__(hidden_size, num_experts, **options)
        self.top_p, self.entropy_index, self.entropy_threshold = top_p, entropy_index, entropy_threshold

    def select(self, x: Tensor, router_logits: Tensor, top_k: int, norm_topk_prob: bool) -> Routing:
        """See `top_p_gate`."""
        del x, norm_topk_prob
        return top_p_gate(router_logits, top_k, self.top_p, self.entropy_index, self.entropy_threshold)


class SparsegenRouter(LinearRouter):
    """A linear router with `sparsegen_gate`, `lam = logsigmoid(v . relu(W x + b) + c) + 0.99` from each token.

    Parameters are flat, as in `GraphRouter`: `sparsity_proj` (W, `[g, d]`), `sparsity_proj_bias` (b, `[g]`),
    `sparsity_out` (v, `[g]`) and `sparsity_out_bias` (c).

    Args:
        hidden_size: d.
        num_experts: N.
        width: g.
        **options: of `LinearRouter`.
    """

    def __init__(self, hidden_size: int, num_experts: int, *, width: int, **options: Any) -> None:
        super().__init__(hidden_size, num_experts, **options)
        self.sparsity_proj = nn.Parameter(torch.empty(width, hidden_size))
        self.sparsity_proj_bias = nn.Parameter(torch.full((width,), _SPARSITY_BIAS))
        self.sparsity_out = nn.Parameter(torch.empty(width))
        self.sparsity_out_bias = nn.Parameter(torch.full((), _SPARSITY_BIAS))
        nn.init.kaiming_uniform_(self.sparsity_proj, a=math.sqrt(5))
        nn.init.uniform_(self.sparsity_out, -1 / math.sqrt(width), 1 / math.sqrt(width))

    def sparsity(self, x: Tensor) -> Tensor:
        """The predicted lam of tokens `[tokens, d]`: `[tokens]`, float32, below 1."""
        hidden = F.linear(x.float(), self.sparsity_proj.float(), self.sparsity_proj_bias.float()).relu()
        return (
            F.logsigmoid(hidden @ self.sparsity_out.float() + self.sparsity_out_bias.float())
            + _LARGEST_SPARSITY
        )

    def select(self, x: Tensor, router_logits: Tensor, top_k: int, norm_topk_prob: bool) -> Routing:
        """See `sparsegen_gate`."""
        del top_k, norm_topk_prob
        return sparsegen_gate(router_logits, self.sparsity(x))
