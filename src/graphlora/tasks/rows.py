"""Rows from files and from the hub, each with the place that an error message can name."""

from __future__ import annotations

import csv
import gzip
import io
import zlib
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from graphlora.errors import GraphLoraError
from graphlora.untrusted import parse_json

# What a compressed file may unpack to: this much, and on top of it so many times its size.
UNPACKED_FREE, UNPACKED_RATIO = 64 * 2**20, 100
MAX_LINE_BYTES = 16 * 2**20
SUFFIXES = (".jsonl", ".jsonl.gz", ".json", ".csv", ".parquet")


@dataclass(frozen=True)
class Row:
    """One record and its place, `file:line` or `data set[split]:row`.

    Attributes:
        values: Column name to value.
        where: Place for error messages.
    """

    values: dict[str, Any]
    where: str


def find_split(folder: Path, split: str) -> Path | None:
    """The file of `split` in `folder`, with the first of the known endings that is there."""
    paths = (folder / f"{split}{suffix}" for suffix in SUFFIXES)
    return next((path for path in paths if path.is_file()), None)


def read_rows(path: Path) -> list[Row]:
    """Rows of a .jsonl, .jsonl.gz, .json, .csv or .parquet file.

    Raises:
        GraphLoraError: The file is missing, empty, of another kind, not UTF-8 or broken; names file and line.
    """
    if not path.is_file():
        raise GraphLoraError(f"no data file at {path}; check the path")
    if not path.name.endswith(SUFFIXES):
        raise GraphLoraError(f"{path} is of an unknown kind; use one of {', '.join(SUFFIXES)}")
    try:
        rows = _parquet(path) if path.suffix == ".parquet" else _text_rows(path)
    except UnicodeDecodeError as error:
        raise GraphLoraError(f"{path} is not UTF-8 text ({error.reason}); convert it to UTF-8") from error
    except (OSError, EOFError, zlib.error) as error:
        raise GraphLoraError(f"{path} cannot be read: {error}") from error
    if not rows:
        raise GraphLoraError(f"{path} has no rows; add some, or give another file")
    return rows


def read_hub(hub_id: str, config: str | None, split: str, revision: str | None = None) -> list[Row]:
    """Rows of one split of a data set on the Hugging Face Hub.

    Raises:
        GraphLoraError: The data set, configuration or split cannot be loaded.
    """
    from datasets import load_dataset

    with hub_errors(f"split {split!r} of {hub_id}"):
        data = load_dataset(hub_id, config, split=split, revision=revision)
        return [
            Row(dict(values), f"{hub_id}[{split}]:{number}") for number, values in enumerate(data, start=1)
        ]


def hub_splits(hub_id: str, config: str | None) -> list[str]:
    """Names of the splits of a data set on the Hugging Face Hub.

    Raises:
        GraphLoraError: The data set or configuration cannot be reached.
    """
    from datasets import get_dataset_split_names

    with hub_errors(hub_id):
        return list(get_dataset_split_names(hub_id, config))


@contextmanager
def hub_errors(what: str) -> Iterator[None]:
    """Turns what goes wrong on the way to the Hugging Face Hub into a `GraphLoraError` that names `what`."""
    from datasets.exceptions import DatasetsError
    from huggingface_hub.errors import HfHubHTTPError, HFValidationError

    try:
        yield
    except (OSError, ValueError, RuntimeError, DatasetsError, HfHubHTTPError, HFValidationError) as error:
        reason = next(iter(str(error).strip().splitlines()), type(error).__name__)
        raise GraphLoraError(
            f"cannot load {what} from the hub: {reason}; check the name and the network, or use local files"
        ) from error


def _text_rows(path: Path) -> list[Row]:
    text = _unpacked(path) if path.suffix == ".gz" else path.read_bytes()
    decoded = text.decode("utf-8-sig")
    if path.suffix == ".csv":
        return list(_csv(path, decoded))
    if path.suffix == ".json":
        return list(_json(path, decoded))
    return list(_jsonl(path, decoded))


def _unpacked(path: Path) -> bytes:
    """The text of a .gz file; a few bytes that stand for endless text are refused before they fill the memory."""
    most = UNPACKED_FREE + UNPACKED_RATIO * path.stat().st_size
    text, line = bytearray(), 0
    with gzip.open(path, "rb") as file:
        while chunk := file.read(2**20):
            text += chunk
            ends = chunk.rfind(b"\n")
            line = line + len(chunk) if ends < 0 else len(chunk) - ends - 1
            if line > MAX_LINE_BYTES:
                raise GraphLoraError(f"{path} has a line of more than {MAX_LINE_BYTES:,} bytes; split it")
            if len(text) > most:
                raise GraphLoraError(
                    f"{path} unpacks to more than {UNPACKED_RATIO} times its size; unpack it yourself if it is yours"
                )
    return bytes(text)


def _jsonl(path: Path, text: str) -> Iterator[Row]:
    for number, line in enumerate(text.split("\n"), start=1):
        if line.strip():
            yield json_row(line, f"{path}:{number}")


def _json(path: Path, text: str) -> Iterator[Row]:
    if not text.strip():
        return
    records = _parse(text, str(path))
    if not isinstance(records, list):
        raise GraphLoraError(f"{path} holds a JSON {type(records).__name__}; expected a list of objects")
    for number, record in enumerate(records, start=1):
        yield _row(record, f"{path}: record {number}")


def json_row(text: str, where: str) -> Row:
    """Row of one line of JSON.

    Raises:
        GraphLoraError: Broken JSON, or no object; names the place.
    """
    return _row(_parse(text, where), where)


def _parse(text: str, where: str) -> Any:
    return parse_json(text, where)


def _row(record: Any, where: str) -> Row:
    if not isinstance(record, dict):
        raise GraphLoraError(f"{where}: expected a JSON object, found {type(record).__name__}")
    return Row(record, where)


def _csv(path: Path, text: str) -> Iterator[Row]:
    reader = csv.DictReader(io.StringIO(text, newline=""), strict=True)
    try:
        for record in reader:
            where = f"{path}:{reader.line_num}"
            if None in record or None in record.values():
                raise GraphLoraError(
                    f"{where}: the row does not have the header's {len(reader.fieldnames or ())} columns"
                )
            yield Row(dict(record), where)
    except csv.Error as error:
        raise GraphLoraError(f"{path}:{reader.reader.line_num}: broken CSV ({error})") from error


def _parquet(path: Path) -> list[Row]:
    import pyarrow
    from pyarrow import parquet

    try:
        metadata = parquet.read_metadata(path)
        groups = (metadata.row_group(position) for position in range(metadata.num_row_groups))
        if (
            sum(group.total_byte_size for group in groups)
            > UNPACKED_FREE + UNPACKED_RATIO * path.stat().st_size
        ):
            raise GraphLoraError(
                f"{path} unpacks to more than {UNPACKED_RATIO} times its size; write it anew"
            )
        records = parquet.read_table(path).to_pylist()
    except pyarrow.ArrowException as error:
        raise GraphLoraError(f"{path} is not a readable Parquet file: {error}") from error
    return [Row(record, f"{path}: row {number}") for number, record in enumerate(records, start=1)]
