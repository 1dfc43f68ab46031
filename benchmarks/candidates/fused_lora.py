"""A plain LoRA SwiGLU block that saves as little as such a block can: the yardstick for saved activations."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F


class FusedLoraFfn(torch.autograd.Function):
    """`W_down h + s B A h`, `h = silu(gate) * up`; saves x, gate, up and the three low-rank activations."""

    @staticmethod
    def forward(
        ctx: Any, x: Tensor, frozen: tuple[Tensor, Tensor, Tensor], scaling: float, *pairs: Tensor
    ) -> Tensor:
        """`pairs` are A `[r, in]` and B `[out, r]` of gate, up and down; `frozen` their weights `[out, in]`."""
        a1, b1, a3, b3, a2, b2 = pairs
        w_gate, w_up, w_down = frozen
        low_gate, low_up = x @ a1.T, x @ a3.T
        gate = torch.addmm(x @ w_gate.T, low_gate, b1.T, alpha=scaling)
        up = torch.addmm(x @ w_up.T, low_up, b3.T, alpha=scaling)
        hidden = F.silu(gate) * up
        low_down = hidden @ a2.T
        ctx.frozen, ctx.scaling = frozen, scaling
        ctx.save_for_backward(x, gate, up, low_gate, low_up, low_down, *pairs)
        return torch.addmm(hidden @ w_down.T, low_down, b2.T, alpha=scaling)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        """Gradients of x and the pairs."""
        (dy,) = grads
        x, gate, up, low_gate, low_up, low_down, a1, b1, a3, b3, a2, b2 = ctx.saved_tensors
        (w_gate, w_up, w_down), s = ctx.frozen, ctx.scaling
        activated = F.silu(gate)
        hidden = activated * up
        d_low = s * dy @ b2
        d_hidden = torch.addmm(dy @ w_down, d_low, a2)
        d_up = d_hidden * activated
        d_gate = torch.ops.aten.silu_backward(d_hidden * up, gate)
        d_low_gate, d_low_up = s * d_gate @ b1, s * d_up @ b3
        dx = d_gate @ w_gate + d_up @ w_up + d_low_gate @ a1 + d_low_up @ a3
        return (
            dx, None, None,
            d_low_gate.T @ x, s * d_gate.T @ low_gate,
            d_low_up.T @ x, s * d_up.T @ low_up,
            d_low.T @ hidden, s * dy.T @ low_down,
        )  # fmt: skip
