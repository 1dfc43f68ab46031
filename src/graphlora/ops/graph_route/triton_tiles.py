"""Tile sizes of the graph router's kernels."""

from __future__ import annotations

from typing import NamedTuple

import torch

from graphlora.ops.sizes import next_power_of_2

# Tiles of node rows in 16 bits: rows, warps, and how many steps ahead layer 2's weights are read. With more rows the
# weights are read less often, but fewer programs share a multiprocessor. By `(backward, has a self weight)`.
_SMALL_TILES = (64, 4, 2)
_WIDE_TILES = {
    (False, False): (64, 4, 2),
    (False, True): (128, 8, 2),
    (True, False): (64, 4, 2),
    (True, True): (128, 8, 2),
}
_MANY_ROWS = 2**15


class Tiles(NamedTuple):
    """Tile sizes of one router shape; the names are those of the kernels' arguments.

    Attributes:
        tokens: BT of the kernels over nodes.
        num_nodes: NP.
        width: G.
        columns: BK of layer 2.
        columns_back: BO, what the backward kernel takes of layer 1 at a time.
        warps: of the kernels over nodes.
        stages: how many steps ahead layer 2's weights are read.
        depth: BK of the kernels over tokens.
        token_rows: BT of the kernels over tokens.
        precise: float32 products.
    """

    tokens: int
    num_nodes: int
    width: int
    columns: int
    columns_back: int
    warps: int
    stages: int
    depth: int
    token_rows: int
    precise: bool

    @property
    def node_constants(self) -> dict[str, int | bool]:
        """Constants of the kernels over nodes."""
        return {
            "BT": self.tokens,
            "NP": self.num_nodes,
            "TP": max(16, self.tokens),
            "G": self.width,
            "BK": self.columns,
            "STAGES": self.stages,
            "PRECISE": self.precise,
            "num_warps": self.warps,
        }

    @property
    def token_constants(self) -> dict[str, int | bool]:
        """Constants of the kernels over tokens."""
        return {"BT": self.token_rows, "G": self.width, "BK": self.depth, "PRECISE": self.precise}


def tiles_for(
    tokens: int, num_experts: int, g: int, dtype: torch.dtype,
    has_self: bool = False, backward: bool = False, edges: bool = False,
) -> Tiles:  # fmt: skip
    """Tile sizes of the kernels over nodes and of those over tokens; `edges`: whether the graph has a gradient."""
    precise = dtype == torch.float32
    num_nodes = next_power_of_2(num_experts)
    width = max(16 if precise else 64, next_power_of_2(g))
    if precise:
        rows, warps, stages = 32, 4, 1
    elif width <= 64 or tokens * num_nodes < _MANY_ROWS or num_nodes > 16 or edges:
        # Shared memory holds no more where there are many nodes or a graph to train.
        rows, warps, stages = _SMALL_TILES
    else:
        rows, warps, stages = _WIDE_TILES[backward, has_self]
    return Tiles(
        tokens=max(rows // num_nodes, 1),
        num_nodes=num_nodes,
        width=width,
        columns=min(width, 32 if precise else 64),
        columns_back=min(width, 16 if precise else 64),
        warps=warps,
        stages=stages,
        depth=min(width, 32 if precise else 64),
        token_rows=16 if tokens <= 1024 else 64,
        precise=precise,
    )


def input_tiles(tiles: Tiles) -> tuple[int, int, int, int]:
    """Of the gradient of x: tokens and columns of a tile, steps read ahead, and how many programs a GPU should get."""
    if tiles.precise:
        return 32, 32, 1, 1024
    return (128, 64, 3, 128) if tiles.width > 64 else (128, 64, 3, 256)
