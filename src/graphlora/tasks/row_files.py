"""Rows of large files, one after the other, from any place on, in memory that does not grow with the file."""

from __future__ import annotations

import csv
import gzip
import zlib
from collections.abc import Iterator
from pathlib import Path
from typing import IO, Any

from graphlora.errors import GraphLoraError
from graphlora.tasks.rows import MAX_LINE_BYTES, Row, json_row

STREAMED = (".jsonl", ".jsonl.gz", ".csv", ".parquet")
FIRST_LINE = 1
BYTE_ORDER_MARK = b"\xef\xbb\xbf"
PARQUET_ROWS = 1024
# A row, and where the next one starts: bytes (rows of a Parquet file), and the line's number.
Found = tuple[Row, int, int]


def rows_from(path: Path, offset: int = 0, line: int = FIRST_LINE) -> Iterator[Found]:
    """Rows of a file from a place on that this function has given before.

    Args:
        path: A .jsonl, .jsonl.gz, .csv or .parquet file.
        offset: Where to start: a byte, of a compressed file a byte of its text, of a Parquet file a row. A
            compressed file is unpacked up to there; others are entered directly.
        line: Number of the line at `offset`, for messages.

    Yields:
        Each row with the offset and the line number of the next.

    Raises:
        GraphLoraError: The file is missing, of another kind, not UTF-8, changed or broken; names file and line.
    """
    if not path.name.endswith(STREAMED):
        raise GraphLoraError(
            f"{path} cannot be streamed; use one of {', '.join(STREAMED)}, or set streaming to false"
        )
    try:
        if path.suffix == ".parquet":
            yield from _parquet(path, offset)
            return
        opener: Any = gzip.open if path.suffix == ".gz" else open
        with opener(path, "rb") as file:
            read = _csv if path.suffix == ".csv" else _jsonl
            yield from read(path, file, offset, line)
    except (OSError, EOFError, zlib.error) as error:
        raise GraphLoraError(f"{path} cannot be read: {error}; check the file") from error


def _enter(path: Path, file: IO[bytes], offset: int) -> None:
    """Go to the start of a row."""
    if offset == 0:
        if file.read(len(BYTE_ORDER_MARK)) != BYTE_ORDER_MARK:
            file.seek(0)
        return
    file.seek(offset - 1)
    if file.read(1) not in (b"\n", b""):
        raise GraphLoraError(
            f"{path} has changed since the checkpoint: no row starts at byte {offset}; put the old file back"
        )


def _text(raw: bytes, where: str) -> str:
    try:
        return raw.decode()
    except UnicodeDecodeError as error:
        raise GraphLoraError(f"{where} is not UTF-8 text ({error.reason}); convert it to UTF-8") from error


def _raw_lines(path: Path, file: IO[bytes]) -> Iterator[bytes]:
    """Lines one by one; one without end, as a few compressed bytes can hold, does not fill the memory."""
    while raw := file.readline(MAX_LINE_BYTES + 1):
        if len(raw) > MAX_LINE_BYTES:
            raise GraphLoraError(f"{path} has a line of more than {MAX_LINE_BYTES:,} bytes; split it")
        yield raw


def _jsonl(path: Path, file: IO[bytes], offset: int, line: int) -> Iterator[Found]:
    _enter(path, file, offset)
    offset = file.tell()
    for number, raw in enumerate(_raw_lines(path, file), start=line):
        offset += len(raw)
        where = f"{path}:{number}"
        text = _text(raw, where)
        if text.strip():
            yield json_row(text, where), offset, number + 1


class _Lines:
    """Lines of a file as text, counted in lines and bytes as they are taken."""

    def __init__(self, path: Path, file: IO[bytes], line: int) -> None:
        self.path, self.file, self.line, self.offset = path, file, line - 1, file.tell()

    def __iter__(self) -> Iterator[str]:
        for raw in _raw_lines(self.path, self.file):
            self.line += 1
            self.offset += len(raw)
            yield _text(raw, f"{self.path}:{self.line}")


def _csv(path: Path, file: IO[bytes], offset: int, line: int) -> Iterator[Found]:
    _enter(path, file, 0)
    lines = _Lines(path, file, FIRST_LINE)
    try:
        columns = next(csv.reader(lines, strict=True), None)
        if columns is None:
            return
        if offset > lines.offset:
            _enter(path, file, offset)
            lines = _Lines(path, file, line)
        for values in csv.reader(lines, strict=True):
            where = f"{path}:{lines.line}"
            if values and len(values) != len(columns):
                raise GraphLoraError(f"{where}: the row does not have the header's {len(columns)} columns")
            if values:
                yield Row(dict(zip(columns, values, strict=True)), where), lines.offset, lines.line + 1
    except csv.Error as error:
        raise GraphLoraError(f"{path}:{lines.line}: broken CSV ({error})") from error


def _parquet(path: Path, offset: int) -> Iterator[Found]:
    import pyarrow
    from pyarrow import parquet

    try:
        with parquet.ParquetFile(path) as file:
            start = 0
            for group in range(file.num_row_groups):
                size = file.metadata.row_group(group).num_rows
                if start + size > offset:
                    yield from _row_group(path, file, group, start, offset)
                start += size
    except pyarrow.ArrowException as error:
        raise GraphLoraError(f"{path} is not a readable Parquet file: {error}") from error


def _row_group(path: Path, file: Any, group: int, start: int, offset: int) -> Iterator[Found]:
    number = start
    for batch in file.iter_batches(batch_size=PARQUET_ROWS, row_groups=[group]):
        skipped = min(max(0, offset - number), len(batch))
        number += skipped
        for values in batch.slice(skipped).to_pylist():
            number += 1
            yield Row(values, f"{path}: row {number}"), number, number + 1
