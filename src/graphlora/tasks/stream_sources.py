"""Sources of rows that are read again and again without being held: files, hub data sets, and small tasks."""

from __future__ import annotations

import glob
import hashlib
import itertools
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field, replace
from functools import cached_property, partial
from pathlib import Path
from typing import Any, Protocol

import numpy as np

from graphlora.errors import GraphLoraError
from graphlora.tasks.catalog import find_task, load_examples
from graphlora.tasks.custom import HUB_PREFIX, SPLIT_NAMES, digest
from graphlora.tasks.example import Example, TextExample
from graphlora.tasks.row_files import FIRST_LINE, STREAMED, rows_from
from graphlora.tasks.rows import Row, hub_errors, hub_splits
from graphlora.tasks.shapes import Reader, find_shape, read_row

AnyExample = Example | TextExample
# One of this many rows is held out for validation where the data has no validation rows of its own.
HELD_OUT_OF = 100
PROBE_BYTES = 1 << 16
# Place of a row as JSON: the pass over the data, then what the source needs to find the row again.
Place = list[Any]
START: Place = [0]


class Source(Protocol):
    """Rows of one split, without end: after the last row of a pass comes the first of the next."""

    @property
    def name(self) -> str:
        """What the user called it."""
        ...

    def examples(self, place: Place, seed: int | None) -> Iterator[tuple[AnyExample, int, Place]]:
        """Each example from a place on, with the number of its pass and the place of the next.

        Args:
            place: `START`, or a place that this method gave.
            seed: Seed of the order of the files in each pass; `None` for their own order.
        """
        ...

    def one_pass(self) -> Iterator[AnyExample]:
        """The examples of one pass."""
        ...

    def fingerprint(self) -> str:
        """What identifies the data without reading all of it."""
        ...


@dataclass(frozen=True)
class FileSource:
    """Rows of files.

    Attributes:
        name: What the user called them.
        files: The files, in the order of their names.
        split: `"train"` or `"validation"`.
        holds_out: Whether the split is told by the rows: by their column `split`, else by a hash of their content,
            which gives validation one in a hundred.
    """

    name: str
    files: tuple[Path, ...]
    split: str
    holds_out: bool

    def examples(self, place: Place, seed: int | None) -> Iterator[tuple[AnyExample, int, Place]]:
        """See `Source`; a place is [pass, file, offset, line]."""
        first, start, *inside = place if len(place) == 4 else (0, 0, 0, FIRST_LINE)
        found = place != START
        for number in itertools.count(first):
            order = self._order(number, seed)
            for at in range(start, len(order)):
                for row, offset, line in rows_from(self.files[order[at]], *inside):
                    if self._is_wanted(row):
                        found = True
                        yield _example(self._shape, row), number, [number, at, offset, line]
                inside = [0, FIRST_LINE]
            if not found:
                raise _no_rows(self)
            found, start = False, 0

    def one_pass(self) -> Iterator[AnyExample]:
        """See `Source`."""
        for file in self.files:
            for row, _, _ in rows_from(file):
                if self._is_wanted(row):
                    yield _example(self._shape, row)

    def fingerprint(self) -> str:
        """Hash of names, sizes, and the first and last 64 KiB of each file."""
        found = hashlib.sha256()
        for path in self.files:
            size = path.stat().st_size
            found.update(f"{path.name}:{size}\n".encode())
            with path.open("rb") as file:
                found.update(file.read(PROBE_BYTES))
                file.seek(max(0, size - PROBE_BYTES))
                found.update(file.read(PROBE_BYTES))
        return found.hexdigest()

    def _order(self, number: int, seed: int | None) -> list[int]:
        if seed is None:
            return list(range(len(self.files)))
        return [int(at) for at in np.random.default_rng([seed, number]).permutation(len(self.files))]

    def _is_wanted(self, row: Row) -> bool:
        return not self.holds_out or split_of(row) == self.split

    @cached_property
    def _shape(self) -> Reader:
        rows = (row for file in self.files for row, _, _ in rows_from(file))
        return find_shape(next(rows))


@dataclass(frozen=True)
class HubSource:
    """Rows of a split on the Hugging Face Hub, streamed.

    Attributes:
        name: What the user called it.
        open: Makes the `datasets.IterableDataset`.
        split: `"train"` or `"validation"`.
        holds_out: As in `FileSource`.
        identity: What identifies the data.
    """

    name: str
    open: Callable[[], Any]
    split: str
    holds_out: bool
    identity: str

    def examples(self, place: Place, seed: int | None) -> Iterator[tuple[AnyExample, int, Place]]:
        """See `Source`; a place is [pass, state of the data set, row]. The rows keep their order."""
        del seed
        first, entry, count = place if len(place) == 3 else (0, None, 0)
        found = place != START
        for number in itertools.count(first):
            for values, state in self._rows(entry):
                count += 1
                row = Row(values, f"{self.name}:{count}")
                if not self.holds_out or split_of(row) == self.split:
                    found = True
                    yield _example(self._shape, row), number, [number, state, count]
            if not found:
                raise _no_rows(self)
            found, entry, count = False, None, 0

    def _rows(self, state: Any) -> Iterator[tuple[dict[str, Any], Any]]:
        with hub_errors(self.name):
            data = self.open()
            if state is not None:
                data.load_state_dict(state)
            rows = iter(data)
        while True:
            with hub_errors(self.name):
                values = next(rows, None)
            if values is None:
                return
            yield dict(values), data.state_dict()

    def one_pass(self) -> Iterator[AnyExample]:
        """See `Source`."""
        for example, number, _ in self.examples(START, None):
            if number:
                return
            yield example

    def fingerprint(self) -> str:
        """Name and revision."""
        return self.identity

    @cached_property
    def _shape(self) -> Reader:
        values, _ = next(self._rows(None))
        return find_shape(Row(values, f"{self.name}:1"))


@dataclass(frozen=True)
class TaskSource:
    """Rows of a named task, which fit in memory: to mix with a stream.

    Attributes:
        name: The task.
        items: Its examples.
    """

    name: str
    items: list[Any] = field(repr=False)

    def examples(self, place: Place, seed: int | None) -> Iterator[tuple[AnyExample, int, Place]]:
        """See `Source`; a place is [pass, row]."""
        del seed
        first, start = place if len(place) == 2 else (0, 0)
        for number in itertools.count(first):
            for at in range(start, len(self.items)):
                yield self.items[at], number, [number, at + 1]
            start = 0

    def one_pass(self) -> Iterator[AnyExample]:
        """See `Source`."""
        return iter(self.items)

    def fingerprint(self) -> str:
        """Hash of the examples."""
        return hashlib.sha256(repr(self.items).encode()).hexdigest()


def open_source(spec: str, split: str, data_dir: str | Path | None = None) -> Source:
    """Source of one split.

    Args:
        spec: A file, a folder, a pattern such as `data/part-*.jsonl`, `hub:owner/name[:config]`, or a task's name.
        split: `"train"` or `"validation"`.
        data_dir: Folder of the named tasks' files.

    Raises:
        GraphLoraError: No such data, a kind that cannot be streamed, or no rows for the split.
    """
    if find_task(spec) is not None:
        return TaskSource(spec, list(load_examples(spec, split, data_dir=data_dir)))
    if spec.startswith(HUB_PREFIX):
        return _hub_source(spec, split)
    named = files_by_split(spec)
    wanted = "train" if "validation" not in named else split
    if wanted not in named:
        raise GraphLoraError(f"{spec} has no {wanted} files; found {', '.join(named)} files")
    return FileSource(spec, named[wanted], split, "validation" not in named)


def files_by_split(spec: str) -> dict[str, tuple[Path, ...]]:
    """Files of a spec by split, told in a folder by how their names (or their subfolder's) begin.

    Raises:
        GraphLoraError: No file, or one that cannot be streamed.
    """
    path = Path(spec)
    if not path.is_dir():
        files = [path] if path.is_file() else sorted(Path(found) for found in glob.glob(spec, recursive=True))
        files = [file for file in files if file.is_file()]
        if not files:
            raise GraphLoraError(
                f"no data at {spec}; give a file, a folder, or a pattern such as 'data/*.jsonl'"
            )
        return {"train": tuple(map(_streamable, files))}
    found: dict[str, list[Path]] = {}
    for file in sorted(path.rglob("*")):
        if file.is_file() and file.name.endswith((*STREAMED, ".json")):
            found.setdefault(_split_of_name(file.relative_to(path)), []).append(_streamable(file))
    if not found:
        raise GraphLoraError(f"{spec} has no data files ({', '.join(STREAMED)})")
    if "" in found and len(found) == 1:
        found = {"train": found[""]}
    return {name: tuple(files) for name, files in found.items() if name}


def _example(shape: Reader, row: Row) -> AnyExample:
    """Example that knows its place: a message about its tokens comes when the row is gone."""
    example = read_row(shape, row, row.where)
    return example if example.id == row.where else replace(example, id=f"{example.id} ({row.where})")


def _no_rows(source: FileSource | HubSource) -> GraphLoraError:
    return GraphLoraError(
        f"{source.name} has no rows for split {source.split!r}; add some, or name a file or folder that has them"
    )


def split_of(row: Row) -> str:
    """Split of a row: its column `split`, else by a hash of its content."""
    given = row.values.get("split")
    if given is not None:
        name = SPLIT_NAMES.get(str(given))
        if name is None:
            raise GraphLoraError(f"{row.where}: split {given!r} is unknown; use train, validation or test")
        return name
    return "validation" if int(digest(row)[:8], 16) % HELD_OUT_OF == 0 else "train"


def is_pattern(spec: str) -> bool:
    """Whether `spec` stands for several files, as `data/part-*.jsonl` does."""
    return glob.has_magic(spec) and not spec.startswith(HUB_PREFIX) and not Path(spec).exists()


def data_bytes(specs: Sequence[str]) -> int:
    """Size of the local files among the specs, as unpacked; 0 where there are none."""
    total = 0
    for spec in specs:
        if find_task(spec) is not None or spec.startswith(HUB_PREFIX):
            continue
        path = Path(spec)
        files = path.rglob("*") if path.is_dir() else [Path(found) for found in glob.glob(spec)] or [path]
        for file in files:
            if file.is_file() and file.name.endswith(STREAMED):
                packed = file.suffix in (".gz", ".parquet")
                total += file.stat().st_size * (5 if packed else 1)
    return total


def _streamable(path: Path) -> Path:
    if not path.name.endswith(STREAMED):
        raise GraphLoraError(
            f"{path} cannot be streamed; use {', '.join(STREAMED)}, or set streaming to false"
        )
    return path


def _split_of_name(path: Path) -> str:
    for part in path.parts:
        word = part.split(".")[0].split("-")[0].split("_")[0]
        if word in SPLIT_NAMES:
            return SPLIT_NAMES[word]
    return ""


def _hub_source(spec: str, split: str) -> HubSource:
    hub_id, _, config = spec.removeprefix(HUB_PREFIX).partition(":")
    names = {SPLIT_NAMES[name]: name for name in hub_splits(hub_id, config or None) if name in SPLIT_NAMES}
    wanted = split if "validation" in names else "train"
    if wanted not in names:
        raise GraphLoraError(f"{spec} has no split {wanted!r}; found {', '.join(names) or 'nothing'}")

    opened = partial(_open_hub, hub_id, config or None, names[wanted])
    return HubSource(f"{hub_id}[{names[wanted]}]", opened, split, "validation" not in names, spec)


def _open_hub(hub_id: str, config: str | None, split: str) -> Any:
    from datasets import load_dataset

    return load_dataset(hub_id, config, split=split, streaming=True)
