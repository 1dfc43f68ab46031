"""What the graph router works on."""

from __future__ import annotations

from typing import NamedTuple

from torch import Tensor


class GraphWeights(NamedTuple):
    """Node features and weights of the router of one FFN block, all float32.

    Shapes: N experts, g router width, L layers.

    Attributes:
        experts: expert node features E', `[N, g]`.
        conv: W_l, `[L, g, g]`, applied as `H W^T`.
        self_weight: S_l, `[L, g, g]`, for the self term `"weight"` and for the `"sage"` convolution; else None.
        attention: `[L, 2, g]` source and target vectors of the `"gat"` convolution; else None.
        out: p, `[g]`.
        adjacency: expert-expert block `[N, N]`, values in [0, 1], for `"sage"` and `"gat"`.
        normalized: Â of experts and token, `[N + 1, N + 1]`, for `"gcn"`.
        residual: a of the self term `"residual"`; 0 without one.
    """

    experts: Tensor
    conv: Tensor
    self_weight: Tensor | None
    attention: Tensor | None
    out: Tensor
    adjacency: Tensor
    normalized: Tensor
    residual: float
