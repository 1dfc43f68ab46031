"""Rows of large files: the same as from the whole file, from any place on, with the line in every message."""

import csv
import gzip
import json

import pyarrow
import pytest
from pyarrow import parquet

from graphlora.errors import GraphLoraError
from graphlora.tasks.row_files import rows_from
from graphlora.tasks.rows import read_rows

ROWS = [{"prompt": f"zahl {n}, ü", "completion": f' "{n}"\nand more' * (n % 3 + 1)} for n in range(57)]


def write(path, rows=ROWS):
    if path.name.endswith(".parquet"):
        parquet.write_table(pyarrow.Table.from_pylist(rows), path, row_group_size=10)
    elif path.name.endswith(".csv"):
        with path.open("w", newline="", encoding="utf-8-sig") as file:
            writer = csv.DictWriter(file, rows[0].keys())
            writer.writeheader()
            writer.writerows(rows)
    else:
        text = "".join(json.dumps(row, ensure_ascii=False) + "\n\n" for row in rows).encode("utf-8-sig")
        path.write_bytes(gzip.compress(text) if path.suffix == ".gz" else text)
    return path


@pytest.mark.parametrize("name", ["a.jsonl", "a.jsonl.gz", "a.csv", "a.parquet"])
def test_every_place_leads_to_the_rows_after_it(tmp_path, name):
    path = write(tmp_path / name)
    found = list(rows_from(path))
    assert [row for row, _, _ in found] == read_rows(path)
    for at, (_, offset, line) in enumerate(found):
        assert [row for row, _, _ in rows_from(path, offset, line)] == [row for row, _, _ in found[at + 1 :]]


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("a.jsonl", '{"a": 1}\n{"a": 2}\n{"a":\n', r"a\.jsonl:3: broken JSON"),
        ("a.jsonl", '{"a": 1}\n[2]\n', r"a\.jsonl:2: expected a JSON object, found list"),
        ("a.csv", "a,b\n1,2\n3\n", r"a\.csv:3: the row does not have the header's 2 columns"),
        ("a.csv", 'a,b\n1,2\n3,"4" 5\n', r"a\.csv:3: broken CSV"),
        ("a.json", "[]", r"a\.json cannot be streamed; use one of \.jsonl.* or set streaming to false"),
    ],
)
def test_a_broken_row_is_named_with_file_and_line(tmp_path, name, content, message):
    path = tmp_path / name
    path.write_text(content)
    with pytest.raises(GraphLoraError, match=message):
        list(rows_from(path))


def test_the_line_is_right_after_entering_in_the_middle(tmp_path):
    path = tmp_path / "a.jsonl"
    path.write_text('{"a": 1}\n\n{"a": 2}\n{"a": 3\n')
    _, offset, line = next(rows_from(path))
    with pytest.raises(GraphLoraError, match=r"a\.jsonl:4: broken JSON"):
        list(rows_from(path, offset, line))


def test_text_that_is_not_utf8_and_files_that_are_cut_short_are_named(tmp_path):
    latin = tmp_path / "a.jsonl"
    latin.write_bytes(b'{"a": 1}\n{"a": "\xff"}\n')
    with pytest.raises(GraphLoraError, match=r"a\.jsonl:2 is not UTF-8 text"):
        list(rows_from(latin))
    cut = write(tmp_path / "b.jsonl.gz")
    cut.write_bytes(cut.read_bytes()[:-20])
    with pytest.raises(GraphLoraError, match=r"b\.jsonl\.gz cannot be read"):
        list(rows_from(cut))
    (tmp_path / "c.parquet").write_bytes(b"PAR1 no")
    with pytest.raises(GraphLoraError, match=r"c\.parquet is not a readable Parquet file"):
        list(rows_from(tmp_path / "c.parquet"))


def test_a_file_that_changed_under_a_place_is_refused(tmp_path):
    path = write(tmp_path / "a.jsonl")
    offset = list(rows_from(path))[9][1]
    path.write_bytes(b" " + path.read_bytes())
    with pytest.raises(
        GraphLoraError, match=rf"has changed since the checkpoint: no row starts at byte {offset}"
    ):
        list(rows_from(path, offset, 10))
