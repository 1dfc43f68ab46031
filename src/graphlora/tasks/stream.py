"""A stream of examples without end: sources mixed by weight, shuffled block by block, entered at any place."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict, dataclass, field
from typing import Any

import numpy as np

from graphlora.errors import GraphLoraError
from graphlora.tasks.stream_sources import START, AnyExample, Place, Source


@dataclass(frozen=True)
class Block:
    """Start of a block: the rows that are shuffled together.

    Attributes:
        number: Blocks before it.
        row: Rows before it.
        passes: Whole passes over the data before it.
        places: Place of each source.
        taken: Rows taken of each source.
    """

    number: int = 0
    row: int = 0
    passes: int = 0
    places: tuple[Place, ...] = ()
    taken: tuple[int, ...] = ()


@dataclass(frozen=True)
class StreamPlace:
    """Place in a stream: so many rows were given; the next one is in this block."""

    row: int = 0
    block: Block = field(default_factory=Block)

    def as_dict(self) -> dict[str, Any]:
        """As JSON values."""
        return asdict(self)

    @classmethod
    def from_dict(cls, values: dict[str, Any]) -> StreamPlace:
        """From JSON values.

        Raises:
            GraphLoraError: They are not what `as_dict` gives.
        """
        try:
            block = dict(values["block"])
            places, taken = tuple(block.pop("places")), tuple(block.pop("taken"))
            place = cls(int(values["row"]), Block(**block, places=places, taken=taken))
        except (KeyError, TypeError, ValueError) as error:
            raise GraphLoraError(f"the place in the stream {values!r} is damaged: {error}") from error
        return place


@dataclass(frozen=True)
class ExampleStream:
    """What is read, in which order.

    Attributes:
        sources: Where rows come from.
        weights: Weight of each source.
        block_size: Rows that are shuffled together; 1 keeps their order.
        seed: Seed of the orders.
        keeps: Whether an example counts as a row.
        epoch_rows: Rows of an epoch, where they were counted.
    """

    sources: Sequence[Source]
    weights: Sequence[float]
    block_size: int
    seed: int
    keeps: Callable[[AnyExample], bool] | None = None
    epoch_rows: int | None = None

    @property
    def shares(self) -> list[float]:
        """Share of each source in the rows."""
        total = sum(self.weights)
        return [weight / total for weight in self.weights]

    def rows(self, place: StreamPlace) -> Iterator[tuple[AnyExample, StreamPlace]]:
        """Each row from a place on, with the place of the next; without end.

        Raises:
            GraphLoraError: A row that is broken or does not fit; names file and line.
        """
        block = place.block if place.block.places else self._start()
        mixer = _Mixer(self, block)
        skipped = place.row - block.row
        while True:
            items, passes = mixer.take(self._block_size(block.row))
            after = Block(block.number + 1, block.row + len(items), mixer.next_pass(passes), *mixer.state())
            order = self._order(block.number, len(items))
            for at in range(skipped, len(items)):
                last = at + 1 == len(items)
                yield items[order[at]], StreamPlace(block.row + at + 1, after if last else block)
            block, skipped = after, 0

    def count(self) -> int:
        """Rows of an epoch, by reading all of them: of a mixture, until the first source runs out.

        Raises:
            GraphLoraError: A row that is broken or does not fit, or no row at all.
        """
        counts = [sum(1 for item in source.one_pass() if self.counts(item)) for source in self.sources]
        for source, number in zip(self.sources, counts, strict=True):
            if number == 0:
                raise GraphLoraError(f"{source.name} has no row to train on; check its rows and max_length")
        return max(
            1, int(min(number / share for number, share in zip(counts, self.shares, strict=True)) + 1e-9)
        )

    def counts(self, example: AnyExample) -> bool:
        """Whether an example counts as a row."""
        return self.keeps is None or self.keeps(example)

    def _start(self) -> Block:
        return Block(places=tuple(START for _ in self.sources), taken=tuple(0 for _ in self.sources))

    def _block_size(self, row: int) -> int:
        """A block ends where an epoch ends, so that no row of the next one comes before this one's last."""
        if self.epoch_rows is None:
            return self.block_size
        return min(self.block_size, self.epoch_rows - row % self.epoch_rows)

    def _order(self, number: int, size: int) -> Sequence[int]:
        if self.block_size == 1:
            return range(size)
        return np.random.default_rng([self.seed, number, size]).permutation(size).tolist()


class _Mixer:
    """Takes rows from the sources by their weights: always from the one that is furthest behind its share."""

    def __init__(self, stream: ExampleStream, block: Block) -> None:
        self._stream, self._shares = stream, stream.shares
        self._places, self._taken = list(block.places), list(block.taken)
        seed = stream.seed if stream.block_size > 1 else None
        self._rows = [
            source.examples(place, seed) for source, place in zip(stream.sources, block.places, strict=True)
        ]
        self._passes = [int(place[0]) for place in block.places]
        self._waiting: tuple[AnyExample, int, Place] | None = None

    def take(self, size: int) -> tuple[list[AnyExample], int]:
        """At most `size` rows, and their pass; of a single source rows of one pass alone."""
        items: list[AnyExample] = []
        alone = len(self._rows) == 1
        passes = 0
        while len(items) < size:
            source = self._furthest_behind()
            found = self._next(source) if self._waiting is None else self._waiting
            example, number, place = found
            if alone and items and number != passes:
                self._waiting = found
                break
            self._waiting = None
            passes = number if alone else 0
            self._places[source] = place
            self._taken[source] += 1
            items.append(example)
        return items, passes

    def state(self) -> tuple[tuple[Place, ...], tuple[int, ...]]:
        """Places of the sources, and rows taken of them."""
        return tuple(self._places), tuple(self._taken)

    def next_pass(self, passes: int) -> int:
        """Pass of the next row, as far as it is known without reading on."""
        return passes if self._waiting is None else self._waiting[1]

    def _furthest_behind(self) -> int:
        rows = sum(self._taken) + 1
        behind = [share * rows - taken for share, taken in zip(self._shares, self._taken, strict=True)]
        return behind.index(max(behind))

    def _next(self, source: int) -> tuple[AnyExample, int, Place]:
        first: int | None = None
        for found in self._rows[source]:
            first = found[1] if first is None else first
            if self._stream.counts(found[0]):
                return found
            if found[1] > first + 1:
                break
        raise GraphLoraError(f"no row of {self._stream.sources[source].name} is left: all are too long")
