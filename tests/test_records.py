"""Run records: round trip, refusals, atomic writing, hashes, provenance."""

import dataclasses
import json
import subprocess
import sys

import pytest

from graphlora import records
from graphlora.errors import GraphLoraError
from graphlora.records import RunRecord, config_hash, data_hash, provenance, write_text


def make():
    return RunRecord.create(
        "evaluation", {"task": "quiz", "seed": 1}, {"acc": 0.5, "n": 4}, seed=1, wall_time=1.5, peak_memory=10
    )


def test_a_record_survives_its_file(tmp_path):
    record = make()
    path = record.write(tmp_path / "new" / "folder" / "run.json")
    assert RunRecord.read(path) == record
    assert [child.name for child in path.parent.iterdir()] == ["run.json"]


def test_numbers_that_are_not_finite_become_null():
    record = dataclasses.replace(make(), metrics={"loss": float("nan"), "list": [float("inf"), 1.0]})
    assert json.loads(record.to_json())["metrics"] == {"loss": None, "list": [None, 1.0]}


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"schema_version": 99}, "schema_version 99 is unknown; this release reads 1"),
        ({"schema_version": None}, "schema_version None is unknown"),
        ({"extra": 1}, "unknown extra"),
        ({"seed": "one"}, r"field seed is 'one'; expected int \| None"),
        ({"seed": True}, "field seed is True"),
        ({"metrics": [1]}, r"field metrics is \[1\]; expected dict"),
        ({"wall_time": "long"}, "field wall_time is 'long'"),
    ],
)
def test_a_record_that_does_not_fit_is_refused(change, message):
    values = json.loads(make().to_json()) | change
    with pytest.raises(GraphLoraError, match=message):
        RunRecord.from_json(json.dumps(values))


def test_missing_fields_broken_text_and_other_files_are_refused(tmp_path):
    values = json.loads(make().to_json())
    del values["metrics"], values["kind"]
    with pytest.raises(GraphLoraError, match="missing kind, metrics"):
        RunRecord.from_json(json.dumps(values))
    with pytest.raises(GraphLoraError, match=r"run\.json: broken JSON"):
        RunRecord.from_json("{", "run.json")
    with pytest.raises(GraphLoraError, match="not a run record"):
        RunRecord.from_json("[]")
    with pytest.raises(GraphLoraError, match="cannot read the record"):
        RunRecord.read(tmp_path / "none.json")


def test_a_failed_write_leaves_the_old_file_and_no_other(tmp_path, monkeypatch):
    path = tmp_path / "run.json"
    write_text(path, "old")

    def full(descriptor):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(records.os, "fsync", full)
    with pytest.raises(GraphLoraError, match=r"cannot write .*run\.json: No space left on device"):
        write_text(path, "new")
    assert path.read_text() == "old"
    assert list(tmp_path.iterdir()) == [path]


def test_an_unwritable_place_is_named(tmp_path):
    (tmp_path / "file").write_text("")
    with pytest.raises(GraphLoraError, match=r"cannot write .*choose another place"):
        make().write(tmp_path / "file" / "run.json")


def test_hashes_depend_on_content_and_not_on_key_order():
    assert config_hash({"a": 1, "b": [2]}) == config_hash({"b": [2], "a": 1})
    assert config_hash({"a": 1}) != config_hash({"a": 2})
    assert data_hash(["x", "y"]) != data_hash(["y", "x"])
    record = make()
    assert data_hash([record]) == data_hash([dataclasses.asdict(record)])


def test_provenance_names_versions_and_platform():
    found = provenance()
    assert {"torch", "transformers", "peft"} <= set(found["versions"])
    assert found["python"] == ".".join(map(str, sys.version_info[:3]))
    assert (found["commit"] is None) == (found["dirty"] is None)
    assert found["commit"] is None or len(found["commit"]) == 40


def test_provenance_outside_a_checkout_has_no_commit(tmp_path, monkeypatch):
    monkeypatch.setattr(records, "__file__", str(tmp_path / "site-packages" / "graphlora" / "records.py"))
    assert records.provenance()["commit"] is None


def test_records_import_no_torch():
    code = "import sys, graphlora.records; sys.exit('torch' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0
