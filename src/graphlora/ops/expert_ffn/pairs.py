"""In which order the (token, expert) pairs of a routing are computed, and which of them together."""

from __future__ import annotations

from collections.abc import Iterator
from typing import NamedTuple, Protocol

import torch
from torch import Tensor

# Bytes of one `[rows, f]` buffer: a few of them fit into the last-level cache of a CPU.
_BUFFER_BYTES = 2**20
_MIN_ROWS = 16


class Part(NamedTuple):
    """Pairs that one low-rank product serves.

    Attributes:
        token: `[n]` token positions, each at most once; None for all tokens in order.
        pairs: which of the pairs these are, `n` of them.
        columns: slice of the `num_experts * r` stacked low-rank rows in use.
    """

    token: Tensor | None
    pairs: slice
    columns: slice


class Pairs(Protocol):
    """An order of the `tokens * top_k` pairs. What belongs to pairs lies in that order in dimension 0."""

    @property
    def buffer_rows(self) -> int | None:
        """Rows of the longest part where parts share buffers; None where every part makes its own tensors."""
        ...

    def parts(self) -> Iterator[Part]:
        """Parts that together hold every pair once."""
        ...

    def spread_weights(self, weights: Tensor) -> Tensor:
        """`[tokens, top_k]` as `[pairs]`."""
        ...

    def collect_weights(self, of_pairs: Tensor) -> Tensor:
        """The inverse of `spread_weights`."""
        ...

    def spread_low(self, low: Tensor) -> Tensor:
        """`[tokens, num_experts * r]` as the columns of each pair's own expert, `[pairs, columns of a part]`."""
        ...

    def collect_low(self, of_pairs: Tensor) -> Tensor:
        """The transpose of `spread_low`: `[tokens, num_experts * r]`, zero for experts not selected."""
        ...


class PairsByExpert:
    """Pairs sorted by expert, a segment at a time. Reads the counts on the host, so it is for CPU tensors.

    Long segments are cut so that what is computed on the way stays in the cache.

    Args:
        top_k_index: `[tokens, top_k]`.
        num_experts: N.
        r: rank.
        row_bytes: size of a row of f elements, which sets the length of a part.
    """

    def __init__(self, top_k_index: Tensor, num_experts: int, r: int, row_bytes: int) -> None:
        self._tokens, self._top_k = top_k_index.shape
        self._num_experts, self._r = num_experts, r
        flat = top_k_index.reshape(-1)
        self._order = torch.argsort(flat, stable=True)
        self._token = self._order.div(self._top_k, rounding_mode="floor")
        self._row = self._token * num_experts + flat[self._order]
        self._counts: list[int] = torch.bincount(flat, minlength=num_experts).tolist()
        self.buffer_rows = min(max(self._counts), max(_MIN_ROWS, _BUFFER_BYTES // row_bytes))

    def parts(self) -> Iterator[Part]:
        """See `Pairs`."""
        start = 0
        for e, count in enumerate(self._counts):
            end = start + count
            while start < end:
                pairs = slice(start, min(start + self.buffer_rows, end))
                yield Part(self._token[pairs], pairs, slice(e * self._r, (e + 1) * self._r))
                start = pairs.stop

    def spread_weights(self, weights: Tensor) -> Tensor:
        """See `Pairs`."""
        return weights.reshape(-1).index_select(0, self._order)

    def collect_weights(self, of_pairs: Tensor) -> Tensor:
        """See `Pairs`."""
        flat = torch.empty_like(of_pairs).index_copy_(0, self._order, of_pairs)
        return flat.view(self._tokens, self._top_k)

    def spread_low(self, low: Tensor) -> Tensor:
        """See `Pairs`."""
        return low.reshape(-1, self._r).index_select(0, self._row)

    def collect_low(self, of_pairs: Tensor) -> Tensor:
        """See `Pairs`."""
        rows = of_pairs.new_zeros(self._tokens * self._num_experts, self._r)
        return rows.index_copy_(0, self._row, of_pairs).view(self._tokens, -1)


class PairsBySlot:
    """All tokens for each top-k slot, columns of other experts zeroed: static shapes, no sort, no host sync.

    Args:
        top_k_index: `[tokens, top_k]`.
        num_experts: N.
        r: rank.
        dtype: of what is computed.
    """

    def __init__(self, top_k_index: Tensor, num_experts: int, r: int, dtype: torch.dtype) -> None:
        self._tokens, self._top_k = top_k_index.shape
        one_hot = torch.nn.functional.one_hot(top_k_index.T, num_experts).to(dtype)
        self._keep = one_hot.repeat_interleave(r, dim=2)
        self.buffer_rows = None

    def parts(self) -> Iterator[Part]:
        """See `Pairs`."""
        for k in range(self._top_k):
            yield Part(None, slice(k * self._tokens, (k + 1) * self._tokens), slice(None))

    def spread_weights(self, weights: Tensor) -> Tensor:
        """See `Pairs`."""
        return weights.T.reshape(-1)

    def collect_weights(self, of_pairs: Tensor) -> Tensor:
        """See `Pairs`."""
        return of_pairs.view(self._top_k, self._tokens).T

    def spread_low(self, low: Tensor) -> Tensor:
        """See `Pairs`."""
        return (low * self._keep).flatten(0, 1)

    def collect_low(self, of_pairs: Tensor) -> Tensor:
        """See `Pairs`."""
        return (of_pairs.view_as(self._keep) * self._keep).sum(dim=0)


def order_pairs(top_k_index: Tensor, num_experts: int, r: int, width: int, dtype: torch.dtype) -> Pairs:
    """By expert on the CPU; by slot on other devices and where Dynamo traces, which want static shapes."""
    if top_k_index.device.type == "cpu" and not torch.compiler.is_compiling():
        return PairsByExpert(top_k_index, num_experts, r, width * dtype.itemsize)
    return PairsBySlot(top_k_index, num_experts, r, dtype)
