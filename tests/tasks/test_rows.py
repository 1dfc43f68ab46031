"""Reading rows: every kind of file, and every way a file can be wrong."""

import csv
import gzip
import json

import pyarrow
import pytest
from pyarrow import parquet

from graphlora.errors import GraphLoraError
from graphlora.tasks.rows import find_split, read_rows

ROWS = [{"question": "Färbung?", "answer": 1}, {"question": "line\u2028break", "answer": 0}]


def test_every_kind_of_file_gives_the_same_rows(tmp_path):
    text = "".join(json.dumps(row, ensure_ascii=False) + "\n" for row in ROWS)
    (tmp_path / "a.jsonl").write_text(text, encoding="utf-8")
    (tmp_path / "a.jsonl.gz").write_bytes(gzip.compress(text.encode(), mtime=0))
    (tmp_path / "a.json").write_text(json.dumps(ROWS))
    parquet.write_table(pyarrow.Table.from_pylist(ROWS), tmp_path / "a.parquet")
    for name in ("a.jsonl", "a.jsonl.gz", "a.json", "a.parquet"):
        assert [row.values for row in read_rows(tmp_path / name)] == ROWS, name


def test_csv_gives_text_and_line_numbers(tmp_path):
    path = tmp_path / "a.csv"
    with path.open("w", newline="", encoding="utf-8-sig") as file:
        writer = csv.writer(file)
        writer.writerows([["question", "answer"], ["two\nlines, and a comma", "A"], ["one\u2028line", "B"]])
    rows = read_rows(path)
    assert [row.values for row in rows] == [
        {"question": "two\nlines, and a comma", "answer": "A"},
        {"question": "one\u2028line", "answer": "B"},
    ]
    assert rows[1].where == f"{path}:4"


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("a.jsonl", b'{"a": 1}\n{"a": \n', r"a\.jsonl:2: broken JSON"),
        ("a.jsonl", b'{"a": 1}\n[1]\n', r"a\.jsonl:2: expected a JSON object, found list"),
        ("a.json", b'{"a": 1}', "holds a JSON dict; expected a list"),
        ("a.json", b"[{]", "broken JSON"),
        ("a.jsonl", b'{"a": "cut', r"a\.jsonl:1: broken JSON \(Unterminated string starting at column 7\)"),
        ("a.jsonl", b"\n\n", r"a\.jsonl has no rows; add some, or give another file"),
        ("a.json", b"", "has no rows"),
        ("a.csv", b"a,b\n", "has no rows"),
        ("a.csv", b"a,b\n1,2\n1,2,3\n", r"a\.csv:3: the row does not have the header's 2 columns"),
        ("a.csv", b"a,b\n1\n", r"a\.csv:2: the row does not have the header's 2 columns"),
        ("a.csv", b'a,b\n1,"2\n', r"a\.csv:2: broken CSV"),
        ("a.jsonl", b'{"a": "\xe9"}\n', "not UTF-8"),
        ("a.jsonl.gz", b"not gzip", "cannot be read"),
        ("a.jsonl.gz", gzip.compress(b'{"a": 1}\n' * 50, mtime=0)[:-12], "cannot be read"),
        ("a.parquet", b"not parquet", "not a readable Parquet file"),
        ("a.txt", b"hello", "unknown kind"),
    ],
)
def test_a_wrong_file_gets_one_line_that_names_it(tmp_path, name, content, message):
    (tmp_path / name).write_bytes(content)
    with pytest.raises(GraphLoraError, match=message) as caught:
        read_rows(tmp_path / name)
    assert "\n" not in str(caught.value)
    assert name in str(caught.value)


def test_a_missing_file_is_named(tmp_path):
    with pytest.raises(GraphLoraError, match=r"no data file at .*nowhere\.jsonl"):
        read_rows(tmp_path / "nowhere.jsonl")


def test_find_split_prefers_jsonl_and_knows_absence(tmp_path):
    assert find_split(tmp_path, "train") is None
    (tmp_path / "train.parquet").touch()
    assert find_split(tmp_path, "train") == tmp_path / "train.parquet"
    (tmp_path / "train.jsonl.gz").touch()
    assert find_split(tmp_path, "train") == tmp_path / "train.jsonl.gz"
