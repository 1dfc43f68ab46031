"""What a task is: where its rows live, how a row becomes an example, which split is which."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal, TypeVar, get_args

import numpy as np

from graphlora.errors import GraphLoraError
from graphlora.tasks.example import Example
from graphlora.tasks.rows import SUFFIXES, Row, find_split, read_hub, read_rows

SplitName = Literal["train", "validation", "test"]
SPLITS: tuple[str, ...] = get_args(SplitName)
T = TypeVar("T")


@dataclass(frozen=True)
class Task:
    """A multiple-choice data set: its place, its splits, and its way from a row to an `Example`.

    A validation split that has a published split of its own is that split. Where `sources` gives validation
    the same published split as another one, validation is a fixed seeded share of it and the other gets the
    rest. Rows of train that repeat a validation or test row (same prompt, same choices in any order) are
    dropped.

    Attributes:
        name: Name on the command line, and of the folder inside `data_dir`.
        row_to_example: Turns a row's values and its position in the published split into an `Example`.
        hub_id: Data set on the Hugging Face Hub, `"owner/name"`.
        hub_config: Its configuration.
        revision: Commit, tag or branch to pin.
        embedded: Folder inside this package with `<split>.jsonl[.gz]`, used unless `data_dir` has the task.
        folder: Folder inside `data_dir` when it is not `name`.
        sources: Published split that each of train, validation and test is taken from.
        validation_share: Share of a shared published split that becomes validation.
        split_seed: Seed of that choice; part of the task, not of a run.
    """

    name: str
    row_to_example: Callable[[dict[str, Any], int], Example]
    hub_id: str | None = None
    hub_config: str | None = None
    revision: str | None = None
    embedded: Path | None = None
    folder: str | None = None
    sources: dict[str, str] = field(default_factory=lambda: {name: name for name in SPLITS})
    validation_share: float = 0.1
    split_seed: int = 42

    def load(
        self, split: str, data_dir: str | Path | None = None, limit: int | None = None, seed: int = 0
    ) -> list[Example]:
        """Examples of one split, in the published order.

        Args:
            split: `"train"`, `"validation"` or `"test"`.
            data_dir: Folder with `<task>/<split>.jsonl[.gz]` (or .json, .csv, .parquet) in the hub's schema.
            limit: Keep this many rows, chosen by `seed`; a smaller limit keeps a part of a larger one's rows.
            seed: Seed of that choice.

        Raises:
            GraphLoraError: Unknown split, missing file, or a row that does not fit; names file and line.
        """
        return [example for _, example in self.load_rows(split, data_dir, limit, seed)]

    def load_rows(
        self, split: str, data_dir: str | Path | None = None, limit: int | None = None, seed: int = 0
    ) -> list[tuple[Row, Example]]:
        """The same examples, each with the row in the hub's schema that it was made of; see `load`."""
        if split not in SPLITS:
            raise GraphLoraError(
                f"task {self.name!r} has no split {split!r}; choose one of {', '.join(SPLITS)}"
            )
        pairs = self._split(split, data_dir)
        if split == "train":
            held_out = {
                _key(item) for other in ("validation", "test") for _, item in self._if_there(other, data_dir)
            }
            pairs = [(row, item) for row, item in pairs if _key(item) not in held_out]
        return subset(pairs, limit, seed)

    def _split(self, split: str, data_dir: str | Path | None) -> list[tuple[Row, Example]]:
        rows = self._rows(split, data_dir)
        pairs = [(row, self._example(row, position)) for position, row in enumerate(rows)]
        source = self.sources[split]
        shared = [name for name in SPLITS if name != "validation" and self.sources[name] == source]
        if self.sources["validation"] != source or not shared:
            return pairs
        held_out = set(holdout(len(pairs), self.validation_share, self.split_seed))
        return [
            pair for position, pair in enumerate(pairs) if (position in held_out) == (split == "validation")
        ]

    def _if_there(self, split: str, data_dir: str | Path | None) -> list[tuple[Row, Example]]:
        folder = self._folder(data_dir)
        if folder is not None and find_split(folder, self.sources[split]) is None:
            return []
        return self._split(split, data_dir)

    def _folder(self, data_dir: str | Path | None) -> Path | None:
        folder = None if data_dir is None else Path(data_dir) / (self.folder or self.name)
        return self.embedded if self.embedded and not (folder and folder.is_dir()) else folder

    def _rows(self, split: str, data_dir: str | Path | None) -> list[Row]:
        source = self.sources[split]
        folder = self._folder(data_dir)
        if folder is None:
            if self.hub_id is None:
                raise GraphLoraError(f"task {self.name!r} is not on the hub; give data_dir")
            return read_hub(self.hub_id, self.hub_config, source, self.revision)
        path = find_split(folder, source)
        if path is None:
            raise GraphLoraError(
                f"task {self.name!r} takes {split} from the published {source} split, and {folder} has no "
                f"{source} file ({', '.join(SUFFIXES)}); add it, or leave data_dir out to use the hub"
            )
        return read_rows(path)

    def _example(self, row: Row, position: int) -> Example:
        try:
            return self.row_to_example(row.values, position)
        except KeyError as error:
            found = ", ".join(row.values)
            raise GraphLoraError(
                f"{row.where}: task {self.name!r} needs column {error}; found {found}"
            ) from error
        except GraphLoraError as error:
            raise GraphLoraError(f"{row.where}: {error}") from error
        except (ValueError, TypeError, IndexError, AttributeError, OverflowError) as error:
            raise GraphLoraError(
                f"{row.where}: does not fit the schema of task {self.name!r}: {error}"
            ) from error


def holdout(count: int, share: float, seed: int) -> list[int]:
    """Positions of the rows that `Dataset.train_test_split(test_size=share, seed=seed)` holds out."""
    size = int(np.ceil(share * count))
    return sorted(int(position) for position in np.random.default_rng(seed).permutation(count)[:size])


def subset(items: Sequence[T], limit: int | None, seed: int) -> list[T]:
    """At most `limit` items chosen by `seed`, in their own order.

    Raises:
        GraphLoraError: `limit` below 1.
    """
    if limit is not None and limit < 1:
        raise GraphLoraError(f"limit is {limit}; give at least 1, or leave it out for all rows")
    if limit is None or limit >= len(items):
        return list(items)
    chosen = np.random.default_rng(seed).permutation(len(items))[:limit]
    return [items[int(position)] for position in sorted(chosen)]


def _key(example: Example) -> tuple[str, ...]:
    contexts = example.prompts or (example.prompt,)
    return tuple(" ".join(str(text).lower().split()) for text in (*contexts, *sorted(example.choices)))
