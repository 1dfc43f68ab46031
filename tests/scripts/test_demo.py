"""The demo clears what an earlier demo left in its output folder, and nothing else."""

import importlib.util
import json
from pathlib import Path

import pytest

SCRIPT = Path(__file__).parents[2] / "scripts" / "demo.py"
spec = importlib.util.spec_from_file_location("demo", SCRIPT)
demo = importlib.util.module_from_spec(spec)
spec.loader.exec_module(demo)


class Started(Exception):
    """The demo has come to its training."""


@pytest.fixture
def start(tmp_path, monkeypatch):
    """Start the demo with an output folder; it ends before anything is trained."""
    model = tmp_path / "model"
    model.mkdir()
    (model / "config.json").write_text("{}")

    def stop(*_):
        raise Started

    monkeypatch.setattr(demo, "run", stop)

    def run(output: Path) -> None:
        monkeypatch.setattr("sys.argv", ["demo.py", "--model", str(model), "--output", str(output)])
        demo.main()

    return run


@pytest.mark.parametrize("name", ["notes.txt", "results.json", "graphlora/adapter_config.json"])
def test_a_folder_of_other_files_is_refused_and_kept(start, tmp_path, name):
    kept = tmp_path / "papers" / name
    kept.parent.mkdir(parents=True)
    kept.write_text('{"mine": 1}')
    with pytest.raises(
        SystemExit, match="papers holds files that are not an earlier demo's; give --output a new"
    ):
        start(tmp_path / "papers")
    assert kept.read_text() == '{"mine": 1}'
    assert [path.name for path in (tmp_path / "papers").iterdir()] == [name.split("/")[0]]


def test_a_file_as_output_is_refused(start, tmp_path):
    (tmp_path / "notes.txt").write_text("mine")
    with pytest.raises(SystemExit, match=r"notes\.txt is not a folder"):
        start(tmp_path / "notes.txt")
    assert (tmp_path / "notes.txt").read_text() == "mine"


@pytest.mark.parametrize("results", [None, {"before": {}, "graphlora": {}, "lora": {}}])
def test_an_earlier_demo_is_cleared_of_its_own_files_only(start, tmp_path, results):
    output = tmp_path / "out"
    with pytest.raises(Started):
        start(output)
    if results is not None:
        (output / "results.json").write_text(json.dumps(results))
    (output / "notes.txt").write_text("mine")
    (output / "graphlora" / "checkpoint-1").mkdir(parents=True)
    (output / "elsewhere").mkdir()
    (output / "elsewhere" / "kept.txt").write_text("mine")
    (output / "lora").symlink_to(output / "elsewhere")
    with pytest.raises(Started):
        start(output)
    assert {path.name for path in output.iterdir()} == {"notes.txt", "elsewhere", "results.json"}
    assert (output / "elsewhere" / "kept.txt").exists()
