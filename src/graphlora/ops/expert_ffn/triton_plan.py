"""Which tokens share a tile: tokens sorted by the set of experts that they selected, planned on the device.

The data is never moved; only token indices are sorted. Nothing is read on the host, so shapes are upper bounds, and a
CUDA graph can capture it. A plan is one int32 tensor; `PlanShape` says where its parts lie.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from functools import lru_cache
from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from graphlora.ops.sizes import ceil_div, next_power_of_2

# More sets than this would leave most tiles nearly empty; then tiles are cut from the sorted tokens regardless of sets.
_MOST_SETS = 128
SORT_BLOCK = 128


@dataclass(frozen=True)
class PlanShape:
    """Sizes of a plan; the same for all batches of equal shape.

    Attributes:
        rows: rows to sort, tokens or (token, choice) pairs.
        num_experts: N.
        top_k: choices per row.
        tile: rows per tile of the token-major kernels.
        chunk: rows per program of the weight gradients.
    """

    rows: int
    num_experts: int
    top_k: int
    tile: int
    chunk: int

    @property
    def num_sets(self) -> int:
        """How many different sets of experts a row can have selected."""
        return math.comb(self.num_experts, self.top_k)

    @property
    def uniform(self) -> bool:
        """Whether all rows of a tile have the same set."""
        return self.num_sets <= _MOST_SETS

    def pieces(self, size: int) -> int:
        """Most pieces of at most `size` rows, rounded up so that every part of the plan is aligned."""
        most = (
            min(self.rows, self.rows // size + self.num_sets) if self.uniform else ceil_div(self.rows, size)
        )
        return _aligned(most)

    @property
    def tiles(self) -> int:
        """Most tiles."""
        return self.pieces(self.tile)

    @property
    def chunks(self) -> int:
        """Most chunks; none where tiles are not uniform, because weight gradients then sort pairs."""
        return self.pieces(self.chunk) if self.uniform else 0

    @property
    def numel(self) -> int:
        """Length of the plan: row order and weights, then start, end, count and experts of every tile and chunk."""
        return sum(_aligned(size) for size in self.sizes())

    def parts(self, plan: Tensor) -> tuple[Tensor, ...]:
        """`(order, weights, start, end, count, experts)`; the last four with tiles first, then chunks.

        `weights` holds the bits of the float32 weights of each sorted row, by ascending expert (uniform plans only).
        """
        sizes, aligned = _part_sizes(self)
        padded = plan.split(aligned)
        return tuple(
            part if size == room else part[:size]
            for part, size, room in zip(padded, sizes, aligned, strict=True)
        )

    def sizes(self) -> list[int]:
        """Of the parts, in their order, without padding."""
        pieces = self.tiles + self.chunks
        return [self.rows, self.rows * self.top_k, pieces, pieces, pieces, pieces * self.num_experts]


@lru_cache(maxsize=64)
def _part_sizes(shape: PlanShape) -> tuple[list[int], list[int]]:
    """Sizes of a plan's parts, and the room that each has."""
    sizes = shape.sizes()
    return sizes, [_aligned(size) for size in sizes]


def _aligned(size: int) -> int:
    """`size` rounded up to 16 bytes of int32: Triton compiles a kernel anew for each pattern of unaligned pointers."""
    return -(-size // 4) * 4


def plan_constants(shape: PlanShape) -> dict[str, Any]:
    """Constants of the kernels that sort rows."""
    sets = max(next_power_of_2(shape.num_sets), 16)
    return {
        "K": shape.top_k, "N": shape.num_experts, "NP": next_power_of_2(shape.num_experts),
        "TILE": shape.tile, "CHUNK": shape.chunk, "SP": sets, "BLOCK": SORT_BLOCK, "COUNTED": 8192 // sets,
    }  # fmt: skip


def make_plan(top_k_index: Tensor, top_k_weights: Tensor, shape: PlanShape) -> Tensor:
    """The plan for `[rows, top_k]` selected experts and weights: a flat int32 tensor of `shape.numel` entries."""
    plan = torch.empty(shape.numel, dtype=torch.int32, device=top_k_index.device)
    order, weights, *pieces = shape.parts(plan)
    if shape.uniform:
        blocks = ceil_div(shape.rows, SORT_BLOCK)
        _sort_kernel[(blocks,)](
            top_k_index, top_k_weights, order, weights, *pieces,
            shape.rows, blocks, shape.tiles, shape.tiles + shape.chunks, num_warps=8, **plan_constants(shape),
        )  # fmt: skip
        return plan
    chosen = top_k_index.sort(dim=1).values.long()
    place = shape.num_experts ** torch.arange(shape.top_k - 1, -1, -1, device=plan.device)
    order.copy_((chosen * place).sum(dim=1).argsort(stable=True))
    _cut_kernel[(shape.tiles,)](
        top_k_index, order, *pieces, shape.rows, K=shape.top_k, N=shape.num_experts,
        NP=next_power_of_2(shape.num_experts), TILE=shape.tile,
    )  # fmt: skip
    return plan


@triton.jit
def _set_rank(ids, t, live, K: tl.constexpr):
    """Position of a row's set of experts among all sets: `sum_j C(e_j, j + 1)` over its experts in ascending order."""
    rank = tl.zeros(t.shape, tl.int32)
    for k in tl.static_range(K):
        e = tl.load(ids + t * K + k, mask=live, other=0).to(tl.int32)
        below = tl.zeros(t.shape, tl.int32)
        for j in tl.static_range(K):
            below += (tl.load(ids + t * K + j, mask=live, other=0).to(tl.int32) < e).to(tl.int32)
        binomial = tl.full(t.shape, 1, tl.int32)
        for i in tl.static_range(K):
            binomial = tl.where(below >= i, binomial * (e - i) // (i + 1), binomial)
        rank += binomial
    return rank


@triton.jit
def _binomial(n, m: tl.constexpr):
    """`C(n, m)`, elementwise."""
    c = n * 0 + 1
    for i in tl.static_range(m):
        c = c * (n - i) // (i + 1)
    return tl.where(n >= m, c, 0)


@triton.jit(do_not_specialize=["T", "blocks", "tiles", "pieces"])
def _sort_kernel(
    ids, weights, order, sorted_weights, start_ptr, end_ptr, count_ptr, experts_ptr, T, blocks, tiles, pieces,
    K: tl.constexpr, N: tl.constexpr, NP: tl.constexpr, SP: tl.constexpr, BLOCK: tl.constexpr,
    COUNTED: tl.constexpr, TILE: tl.constexpr, CHUNK: tl.constexpr,
):  # fmt: skip
    sort_block(
        tl.program_id(0), ids, weights, order, sorted_weights, start_ptr, end_ptr, count_ptr, experts_ptr,
        T, blocks, tiles, pieces, K, N, NP, SP, BLOCK, COUNTED, TILE, CHUNK,
    )  # fmt: skip


@triton.jit
def sort_block(
    block, ids, weights, order, sorted_weights, start_ptr, end_ptr, count_ptr, experts_ptr, T, blocks, tiles, pieces,
    K: tl.constexpr, N: tl.constexpr, NP: tl.constexpr, SP: tl.constexpr, BLOCK: tl.constexpr,
    COUNTED: tl.constexpr, TILE: tl.constexpr, CHUNK: tl.constexpr,
):  # fmt: skip
    """Stable counting sort of a block's rows by their set of experts; every program also describes some pieces.

    Every program counts all rows, COUNTED at a time: cheaper than a launch that counts them once. A piece is a tile,
    or, after all tiles, a chunk: its rows, and its experts in ascending order, which follow from the rank of its set.
    Unused pieces are empty.
    """
    t = block * BLOCK + tl.arange(0, BLOCK)
    live = t < T
    sets = tl.arange(0, SP)
    counts = tl.zeros((COUNTED, SP), tl.int32)
    counts_before = tl.zeros((COUNTED, SP), tl.int32)
    for first in tl.range(0, T, COUNTED, num_stages=3):
        other = first + tl.arange(0, COUNTED)
        key = tl.where(other < T, _set_rank(ids, other, other < T, K), -1)
        hits = (key[:, None] == sets[None, :]).to(tl.int32)
        counts += hits
        counts_before += tl.where((other < block * BLOCK)[:, None], hits, 0)
    total = tl.sum(counts, 0)
    earlier = tl.sum(counts_before, 0)
    begin = tl.cumsum(total, 0) - total
    key = tl.where(live, _set_rank(ids, t, live, K), -1)
    mine = (key[:, None] == sets[None, :]).to(tl.int32)
    place = tl.sum(mine * ((begin + earlier)[None, :] + tl.cumsum(mine, 0) - 1), 1)
    tl.store(order + place, t, mask=live)
    for k in tl.static_range(K):
        e = tl.load(ids + t * K + k, mask=live, other=0)
        below = tl.zeros(t.shape, tl.int32)
        for j in tl.static_range(K):
            below += (tl.load(ids + t * K + j, mask=live, other=0) < e).to(tl.int32)
        w = tl.load(weights + t * K + k, mask=live, other=0.0).to(tl.float32)
        tl.store(sorted_weights + place * K + below, w.to(tl.int32, bitcast=True), mask=live)
    n = tl.arange(0, NP)
    for piece in range(block, pieces, blocks):
        size = tl.where(piece < tiles, TILE, CHUNK)
        index = tl.where(piece < tiles, piece, piece - tiles)
        cuts = (total + size - 1) // size
        last = tl.cumsum(cuts, 0)
        here = (index >= last - cuts) & (index < last)
        start = begin + (index - last + cuts) * size
        tl.store(start_ptr + piece, tl.sum(tl.where(here, start, 0), 0))
        tl.store(end_ptr + piece, tl.sum(tl.where(here, tl.minimum(start + size, begin + total), 0), 0))
        tl.store(count_ptr + piece, K)
        rank = tl.sum(tl.where(here, sets, 0), 0)
        for i in tl.static_range(K):
            # The largest expert first: the largest e with C(e, K - i) <= rank.
            binomials = _binomial(n, K - i)
            largest = tl.sum(((binomials <= rank) & (n < N)).to(tl.int32), 0) - 1
            rank -= tl.sum(tl.where(n == largest, binomials, 0), 0)
            tl.store(experts_ptr + piece * N + (K - 1 - i), largest)


@triton.jit(do_not_specialize=["T"])
def _cut_kernel(
    ids, order, start_ptr, end_ptr, count_ptr, experts_ptr, T,
    K: tl.constexpr, N: tl.constexpr, NP: tl.constexpr, TILE: tl.constexpr,
):  # fmt: skip
    """Tiles of sorted rows regardless of sets, with all experts that their rows selected, ascending."""
    piece = tl.program_id(0)
    start = piece * TILE
    end = tl.minimum(start + TILE, T)
    position = start + tl.arange(0, TILE)
    live = position < end
    t = tl.load(order + position, mask=live, other=0)
    n = tl.arange(0, NP)
    present = tl.zeros((NP,), tl.int32)
    for k in tl.static_range(K):
        e = tl.load(ids + t * K + k, mask=live, other=-1).to(tl.int32)
        present = tl.maximum(present, tl.max((e[:, None] == n[None, :]).to(tl.int32), 0))
    tl.store(experts_ptr + piece * N + tl.cumsum(present, 0) - 1, n, mask=present > 0)
    tl.store(start_ptr + piece, start)
    tl.store(end_ptr + piece, end)
    tl.store(count_ptr + piece, tl.sum(present, 0))
