"""Code in files of others is not run: pickles in a checkpoint, models with code of their own; and bombs in data."""

import gzip
import json
import os
import shutil
from pathlib import Path

import pytest
import torch

from graphlora.errors import GraphLoraError
from graphlora.tasks.row_files import rows_from
from graphlora.tasks.rows import MAX_LINE_BYTES, read_rows
from graphlora.training.checkpoints import SEAL_FILE, seal
from graphlora.training.loading import load_base_model, load_tokenizer
from graphlora.training.recipe import Recipe
from graphlora.training.run import train


class MakesAFile:
    """Unpickled, it leaves a file behind."""

    def __init__(self, path: Path) -> None:
        self.path = path

    def __reduce__(self):
        return os.mkdir, (str(self.path),)


@pytest.mark.parametrize("name", ["optimizer.pt", "scheduler.pt", "rng_state.pth"])
def test_a_checkpoint_with_code_is_not_run(name, tiny_recipe, tmp_path):
    options = tiny_recipe | {"eval_strategy": "no", "load_best_model_at_end": False, "save_steps": 3}
    train(Recipe.from_dict(options))
    for newest in (tmp_path / "out" / "checkpoints").glob("checkpoint-6"):
        shutil.rmtree(newest)
    checkpoint = tmp_path / "out" / "checkpoints" / "checkpoint-3"
    made = tmp_path / "made-by-the-pickle"
    torch.save({"state": MakesAFile(made)}, checkpoint / name)
    torch.load(checkpoint / name, weights_only=False)
    assert made.exists(), "the pickle would not do anything"
    made.rmdir()
    # Whoever writes such a file can write its checksum too.
    (checkpoint / SEAL_FILE).unlink()
    seal(checkpoint)
    with pytest.raises(GraphLoraError, match=r"checkpoint-3 holds more than tensors.*it was not run"):
        train(Recipe.from_dict(options), resume=True)
    assert not made.exists()


@pytest.fixture
def model_with_code(tiny_model, tmp_path):
    """A model whose configuration names code in its own folder."""
    folder = Path(shutil.copytree(tiny_model, tmp_path / "model"))
    config = json.loads((folder / "config.json").read_text())
    config |= {"model_type": "ours", "auto_map": {"AutoConfig": "code.C", "AutoModelForCausalLM": "code.M"}}
    (folder / "config.json").write_text(json.dumps(config))
    (folder / "code.py").write_text(f"import os\nos.mkdir({str(tmp_path / 'made-by-the-model')!r})\n")
    return folder


def test_a_model_with_code_of_its_own_is_refused_without_asking(model_with_code, tmp_path, monkeypatch):
    monkeypatch.setattr("builtins.input", lambda *_: pytest.fail("asked"))
    with pytest.raises(GraphLoraError, match="cannot load model"):
        load_base_model(str(model_with_code), torch.float32)
    tokenizer = json.loads((model_with_code / "tokenizer_config.json").read_text())
    tokenizer |= {"auto_map": {"AutoTokenizer": ["code.T", None]}, "tokenizer_class": "T"}
    (model_with_code / "tokenizer_config.json").write_text(json.dumps(tokenizer))
    with pytest.raises(GraphLoraError, match="cannot load model"):
        load_tokenizer(str(model_with_code))
    assert not (tmp_path / "made-by-the-model").exists()


def test_a_line_of_compressed_data_is_bounded(tmp_path):
    path = tmp_path / "rows.jsonl.gz"
    path.write_bytes(gzip.compress(b" " * (MAX_LINE_BYTES + 2**20), 1))
    for read in (read_rows, lambda path: list(rows_from(path))):
        with pytest.raises(GraphLoraError, match=r"has a line of more than 16,777,216 bytes"):
            read(path)


def test_compressed_data_may_not_unpack_without_end(tmp_path, monkeypatch):
    monkeypatch.setattr("graphlora.tasks.rows.UNPACKED_FREE", 2**20)
    path = tmp_path / "rows.jsonl.gz"
    rows = b'{"prompt": "a", "completion": "b"}\n' * 100_000
    path.write_bytes(gzip.compress(rows))
    assert len(rows) > 2**20 + 100 * path.stat().st_size
    with pytest.raises(GraphLoraError, match="unpacks to more than 100 times its size"):
        read_rows(path)
    monkeypatch.setattr("graphlora.tasks.rows.UNPACKED_FREE", 2**23)
    assert len(read_rows(path)) == 100_000
