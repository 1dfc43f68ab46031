"""State of the two coordination losses in one FFN block: lambda, sigma, and the loads seen so far."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor, nn

from graphlora.router import Float32State

# A freely trained sigma runs towards zero and past it, where the target is not a number.
_SMALLEST_FREE_SCALE = 0.1


class Coordination(Float32State):
    """lambda (`poisson_rate`), sigma (`normal_scale`) and `cumulative_weights` of one FFN block; float32 always.

    The trained offsets are called biases so that optimizers which exempt biases from weight decay exempt them.

    Args:
        num_experts: N.
        poisson_rate_form: `"smooth"`: lambda = 1 + sigmoid(x); `"clamp"`: clamp(1.5 + x, 1, 2); `"fixed"`: 1.5.
        normal_scale_form: `"bounded"`: sigma = N/4 (1 + e^x), so at least N/4; `"free"`: |N/2 + x|; `"fixed"`: N/2.
    """

    poisson_rate_bias: Tensor
    normal_scale_bias: Tensor
    cumulative_weights: Tensor
    float32_names = ("poisson_rate_bias", "normal_scale_bias", "cumulative_weights")

    def __init__(self, num_experts: int, poisson_rate_form: str, normal_scale_form: str) -> None:
        super().__init__()
        self.num_experts = num_experts
        self.poisson_rate_form, self.normal_scale_form = poisson_rate_form, normal_scale_form
        if poisson_rate_form == "fixed":
            self.register_buffer("poisson_rate_bias", torch.zeros(()))
        else:
            self.poisson_rate_bias = nn.Parameter(torch.zeros(()))
        if normal_scale_form == "fixed":
            self.register_buffer("normal_scale_bias", torch.zeros(()))
        else:
            self.normal_scale_bias = nn.Parameter(torch.zeros(()))
        self.register_buffer("cumulative_weights", torch.zeros(num_experts))

    @property
    def poisson_rate(self) -> Tensor:
        """lambda, scalar, in [1, 2]; starts at 1.5."""
        return _poisson_rate(self.poisson_rate_bias, self.poisson_rate_form)

    @property
    def normal_scale(self) -> Tensor:
        """sigma, scalar, in experts; starts at N/2."""
        return _normal_scale(self.normal_scale_bias, self.normal_scale_form, self.num_experts)


def poisson_rates(blocks: Sequence[Coordination], device: torch.device) -> Tensor:
    """Each lambda of an adapter's blocks, `[blocks]`, computed at once on `device`."""
    biases = torch.stack([block.poisson_rate_bias.to(device) for block in blocks])
    return _poisson_rate(biases, blocks[0].poisson_rate_form)


def normal_scales(blocks: Sequence[Coordination], device: torch.device) -> Tensor:
    """Each sigma of an adapter's blocks of equal N, `[blocks]`, computed at once on `device`."""
    biases = torch.stack([block.normal_scale_bias.to(device) for block in blocks])
    return _normal_scale(biases, blocks[0].normal_scale_form, blocks[0].num_experts)


def _poisson_rate(bias: Tensor, form: str) -> Tensor:
    if form == "smooth":
        return 1 + torch.sigmoid(bias)
    rate = 1.5 + bias
    # The released code trains with a gradient at the bounds themselves; PyTorch 2.15 gives `clamp` none there.
    return torch.where((rate >= 1) & (rate <= 2), rate, rate.detach().clamp(1.0, 2.0))


def _normal_scale(bias: Tensor, form: str, num_experts: int) -> Tensor:
    if form == "bounded":
        return num_experts / 4 * (1 + bias.exp())
    return (num_experts / 2 + bias).abs().clamp_min(_SMALLEST_FREE_SCALE)
