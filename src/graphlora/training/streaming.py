"""Training data that is read while training: tokenized on the fly, dealt to ranks and workers, entered anywhere.

All processes walk the same stream of rows and each tokenizes its own share. A place in the stream is therefore one
number of rows, whatever the number of processes and workers: no row is lost or repeated where these change.
"""

from __future__ import annotations

import itertools
import json
import math
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

import torch
from accelerate.utils import send_to_device
from torch.utils.data import DataLoader, IterableDataset, get_worker_info
from transformers import PreTrainedTokenizerBase

from graphlora.errors import GraphLoraError
from graphlora.tasks.stream import ExampleStream, StreamPlace
from graphlora.tasks.stream_sources import AnyExample
from graphlora.training.data import Encoding, Row, encode, encode_all

PLACE_FILE = "stream.json"


class BadRow(GraphLoraError):
    """A row that is broken, does not fit or is too long, met while training."""


@dataclass(frozen=True)
class TokenStream:
    """Rows to train on that are not held in memory.

    Attributes:
        examples: The stream, all rows in their order.
        tokenizer: What turns them into tokens.
        how: How.
        fingerprint: What identifies the data.
    """

    examples: ExampleStream
    tokenizer: PreTrainedTokenizerBase
    how: Encoding
    fingerprint: str

    @property
    def longest(self) -> int:
        """Tokens that the longest row may have."""
        assert self.how.max_length is not None
        return self.how.max_length

    def row(self, example: AnyExample) -> Row:
        """Token row of an example.

        Raises:
            GraphLoraError: It is too long, or cannot be encoded.
        """
        return encode_all([example], self.tokenizer, self.how).rows[0]


@dataclass(frozen=True)
class Deal:
    """Who gets which rows.

    Attributes:
        rank: This process.
        ranks: Number of processes.
        batch_size: Rows of a process in a micro-batch.
        micro_batches: Micro-batches in an optimizer step.
        total_rows: Rows after which the run ends; `None` where steps decide.
    """

    rank: int = 0
    ranks: int = 1
    batch_size: int = 1
    micro_batches: int = 1
    total_rows: int | None = None

    @property
    def step_rows(self) -> int:
        """Rows of an optimizer step, over all processes."""
        return self.ranks * self.batch_size * self.micro_batches

    def num_steps(self, rows_done: int) -> int:
        """Optimizer steps that the rest of the run takes."""
        assert self.total_rows is not None
        return math.ceil(max(0, self.total_rows - rows_done) / self.step_rows)

    def sizes(self, rows_done: int) -> list[list[int]]:
        """Rows of each process in each micro-batch of the next step: `[micro_batches][ranks]`.

        The last step of a run has fewer. They are spread evenly, with one for each at least, so that no process
        waits for another that has nothing to do.
        """
        slots = self.micro_batches * self.ranks
        rows = self.step_rows
        if self.total_rows is not None:
            rows = min(rows, max(slots, self.total_rows - rows_done))
        sizes = [(slot + 1) * rows // slots - slot * rows // slots for slot in range(slots)]
        return [sizes[at : at + self.ranks] for at in range(0, slots, self.ranks)]


class _Batch(NamedTuple):
    """What a worker hands over: a batch, or what went wrong; and the place of the next."""

    rows: Any
    place: StreamPlace
    error: str | None = None


class _Batches(IterableDataset):
    """The micro-batches of one process; with several workers each makes every so-manyth of them."""

    def __init__(
        self, stream: TokenStream, deal: Deal, place: StreamPlace, collate: Callable[[Any], Any]
    ) -> None:
        self.stream, self.deal, self.place, self.collate = stream, deal, place, collate

    def __iter__(self) -> Iterator[_Batch]:
        """Batches without end."""
        worker = get_worker_info()
        number, workers = (0, 1) if worker is None else (worker.id, worker.num_workers)
        place = self.place
        try:
            for at, (mine, place) in enumerate(self._shares()):
                if at % workers == number:
                    yield _Batch(self.collate([self.stream.row(example) for example in mine]), place)
        except GraphLoraError as error:
            # As a value, because PyTorch rewrites what a worker raises.
            yield _Batch(None, place, str(error))

    def _shares(self) -> Iterator[tuple[list[AnyExample], StreamPlace]]:
        """This process's examples of each micro-batch, and the place after all processes' rows of it."""
        place = self.place
        rows = self.stream.examples.rows(place)
        while True:
            for sizes in self.deal.sizes(place.row):
                mine: list[AnyExample] = []
                for rank, size in enumerate(sizes):
                    for _ in range(size):
                        example, place = next(rows)
                        if rank == self.deal.rank:
                            mine.append(example)
                yield mine, place


class StreamLoader:
    """The loader of a process: its batches, and the place in the stream after the last one that was given."""

    def __init__(
        self,
        stream: TokenStream,
        deal: Deal,
        collate: Callable[[Any], Any],
        place: StreamPlace | None = None,
        num_batches: int | None = None,
        num_workers: int = 0,
        device: torch.device | None = None,
        non_blocking: bool = True,
        **options: Any,
    ) -> None:
        """Make batches.

        Args:
            stream: The rows.
            deal: Who gets which.
            collate: Makes a batch of token rows.
            place: Where to start; the beginning when left out.
            num_batches: How many batches to give; without end when left out.
            num_workers: Processes that read and tokenize ahead; batches do not depend on it.
            device: Where batches are copied to; left out: nowhere.
            non_blocking: Copy while the device works, for which `pin_memory` is needed.
            options: Further arguments of `torch.utils.data.DataLoader`.
        """
        self.place = StreamPlace() if place is None else place
        self.stream, self.deal = stream, deal
        self.batch_size = deal.batch_size
        self.dataset = _Batches(stream, deal, self.place, collate)
        self._num_batches, self._device, self._non_blocking = num_batches, device, non_blocking
        self._options = {"num_workers": num_workers, **options}

    def __iter__(self) -> Iterator[Any]:
        """Batches from the place on.

        Raises:
            BadRow: Names file and line.
        """
        # With a generator of its own the loader takes no number from the one that dropout draws from.
        loader = DataLoader(
            self.dataset,
            batch_size=None,
            collate_fn=_unchanged,
            generator=torch.Generator(),
            **self._options,
        )
        for batch in itertools.islice(loader, self._num_batches):
            if batch.error is not None:
                raise BadRow(batch.error)
            self.place = batch.place
            rows, device = batch.rows, self._device
            yield rows if device is None else send_to_device(rows, device, non_blocking=self._non_blocking)

    @property
    def epochs(self) -> float:
        """Passes over the data so far; whole ones where its rows were not counted."""
        count = self.stream.examples.epoch_rows
        return self.place.row / count if count else float(self.place.block.passes)


@dataclass(frozen=True)
class FitsLength:
    """Whether an example has at most `max_length` tokens, for rows that are to be dropped where they have more."""

    tokenizer: PreTrainedTokenizerBase
    how: Encoding

    def __call__(self, example: AnyExample) -> bool:
        """Whether it is kept."""
        row = encode(
            example,
            self.tokenizer,
            scoring=self.how.scoring,
            train_on=self.how.train_on,
            append_eos=self.how.append_eos,
        )
        return self.how.max_length is None or len(row["input_ids"]) <= self.how.max_length


def write_place(folder: Path, loader: StreamLoader) -> None:
    """Write where a checkpoint is in the stream."""
    values = {"fingerprint": loader.stream.fingerprint, **loader.place.as_dict()}
    (folder / PLACE_FILE).write_text(json.dumps(values), encoding="utf-8")


def read_place(folder: Path, stream: TokenStream, tell: Callable[[str], Any]) -> StreamPlace:
    """Where a checkpoint is in the stream.

    Args:
        folder: The checkpoint.
        stream: The stream as it is now.
        tell: Told where the data is not what it was.

    Raises:
        GraphLoraError: The file is missing or damaged, or belongs to other sources.
    """
    path = folder / PLACE_FILE
    try:
        values = json.loads(path.read_text(encoding="utf-8"))
        known = values.pop("fingerprint")
        place = StreamPlace.from_dict(values)
    except (OSError, ValueError, KeyError, AttributeError) as error:
        raise GraphLoraError(
            f"{path} does not say where the run was in its data ({error}); go on from an older checkpoint"
        ) from error
    if len(place.block.places) not in (0, len(stream.examples.sources)):
        raise GraphLoraError(
            f"{path} is of a run with {len(place.block.places)} sources of data; give the same"
        )
    if known != stream.fingerprint:
        tell(
            f"the data is not what it was at {folder.name}; going on after row {place.row:,} of the files as they are"
        )
    return place


def _unchanged(batch: Any) -> Any:
    return batch
