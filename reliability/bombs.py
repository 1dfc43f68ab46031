"""Small files that ask for endless memory, and how much memory refusing them takes: `python -m reliability.bombs`."""

from __future__ import annotations

import gzip
import io
import json
import struct
import sys
import tempfile
import warnings
import zipfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import peft
import torch
from transformers import LlamaConfig, LlamaForCausalLM

from graphlora.errors import GraphLoraError
from graphlora.study.spec import load_spec
from graphlora.tasks.rows import read_rows
from graphlora.training.adapter_files import read_adapter
from graphlora.training.recipe import Recipe
from graphlora.tuner.config import GraphLoraConfig
from graphlora.tuner.tensor_archive import read_tensors
from reliability.record import write_record

LIMIT_MB = 1000
Read = Callable[[Path], Any]


def _adapter(folder: Path) -> Any:
    """As a user of PEFT loads it: nothing of ours stands before."""
    sizes = {"vocab_size": 8, "hidden_size": 16, "intermediate_size": 32, "num_hidden_layers": 2}
    base = LlamaForCausalLM(LlamaConfig(**sizes, num_attention_heads=2, num_key_value_heads=1))
    return peft.PeftModel.from_pretrained(base, str(folder))


def _config(**values: Any) -> Callable[[Path], None]:
    def write(folder: Path) -> None:
        text = json.dumps({"peft_type": "GRAPHLORA", "task_type": "CAUSAL_LM"} | values)
        (folder / "adapter_config.json").write_text(text)

    return write


def _head(head: dict[str, Any], length: int | None = None) -> Callable[[Path], None]:
    def write(folder: Path) -> None:
        _config(num_experts=1024, r=64)(folder)
        text = json.dumps(head).encode()
        content = struct.pack("<Q", len(text) if length is None else length) + text
        (folder / "adapter_model.safetensors").write_bytes(content)

    return write


def _file(name: str, content: bytes | Callable[[], bytes]) -> Callable[[Path], None]:
    def write(folder: Path) -> None:
        (folder / name).write_bytes(content if isinstance(content, bytes) else content())

    return write


def _laughs() -> bytes:
    lines = ["a: &a [x, x, x, x, x, x, x, x, x, x]"]
    lines += [
        f"{b}: &{b} [{', '.join([f'*{a}'] * 10)}]" for a, b in zip("abcdefghij", "bcdefghijk", strict=True)
    ]
    return "\n".join(lines).encode()


def _deflated() -> bytes:
    tensors, packed = io.BytesIO(), io.BytesIO()
    torch.save({"a": torch.zeros(1000)}, tensors)
    with zipfile.ZipFile(tensors) as source, zipfile.ZipFile(packed, "w", zipfile.ZIP_DEFLATED) as target:
        for name in source.namelist():
            zeros = name.endswith("data/0")
            target.writestr(name, bytes(2 * 2**30) if zeros else source.read(name))
    return packed.getvalue()


def _saved(content: Any) -> bytes:
    file = io.BytesIO()
    torch.save(content, file)
    return file.getvalue()


BOMBS: dict[str, tuple[Callable[[Path], None], Read]] = {
    "10^9 experts": (_config(num_experts=10**9), _adapter),
    "rank 10^9": (_config(r=10**9), _adapter),
    "1024 experts of rank 4096": (_config(num_experts=1024, r=4096), _adapter),
    "10^9 experts in one block": (_config(num_experts_pattern={"mlp": 10**9}), _adapter),
    "10^9 router layers": (_config(router_num_layers=10**9), _adapter),
    "router 10^9 wide": (_config(router_hidden_size=10**9), _adapter),
    "an expression without end": (_config(target_modules="(a+)+$"), _adapter),
    "an infinite number": (_config(lora_alpha=float("inf")), _adapter),
    "config nested 10^5 deep": (
        _file("adapter_config.json", b"[" * 10**5 + b"]" * 10**5),
        GraphLoraConfig.from_pretrained,
    ),
    "config of 20 MB": (_config(base_model_name_or_path="x" * 20_000_000), _adapter),
    "more experts than weights": (
        _head(
            {
                "base_model.model.model.layers.0.mlp.graphlora_up_proj.lora_A": {
                    "dtype": "F32",
                    "shape": [4, 2, 0],
                    "data_offsets": [0, 0],
                }
            }
        ),
        _adapter,
    ),
    "10^12 values of nothing": (
        _head(
            {
                "base_model.model.model.layers.0.mlp.graphlora_up_proj.lora_A": {
                    "dtype": "F32",
                    "shape": [0, 10**12],
                    "data_offsets": [0, 0],
                }
            }
        ),
        read_adapter,
    ),
    "a head of 2^60 bytes": (_head({}, length=2**60), read_adapter),
    "YAML aliases for 10^11 values": (
        _file("a.yaml", _laughs()),
        lambda folder: load_spec(str(folder / "a.yaml")),
    ),
    "YAML nested 10^5 deep": (
        _file("a.yaml", b"[" * 10**5),
        lambda folder: Recipe.from_yaml(folder / "a.yaml"),
    ),
    "2 GB of zeros in a .gz": (
        _file("rows.jsonl.gz", lambda: gzip.compress(bytes(2**24)) * 128),
        lambda folder: read_rows(folder / "rows.jsonl.gz"),
    ),
    "2 GB of rows in a .gz": (
        _file(
            "rows.jsonl.gz", lambda: gzip.compress(b'{"prompt": "a", "completion": "b"}\n' * 480_000) * 128
        ),
        lambda folder: read_rows(folder / "rows.jsonl.gz"),
    ),
    "2 GB of zeros in a checkpoint": (
        _file("a.bin", _deflated),
        lambda folder: read_tensors(folder / "a.bin"),
    ),
    "10^9 values that are one": (
        _file("a.bin", lambda: _saved({"a": torch.ones(1, dtype=torch.float16).expand(10**9)})),
        lambda folder: read_tensors(folder / "a.bin"),
    ),
}


def measure(names: list[str]) -> dict[str, dict[str, Any]]:
    """Size of each file, the message that refused it, and the growth of the peak memory meanwhile, in MB."""
    found = {}
    for name in names:
        write, read = BOMBS[name]
        with tempfile.TemporaryDirectory() as place, warnings.catch_warnings():
            warnings.simplefilter("ignore")
            folder = Path(place)
            write(folder)
            size = sum(path.stat().st_size for path in folder.iterdir())
            _reset_peak()
            before = _memory("VmRSS")
            try:
                read(folder)
                message = None
            except GraphLoraError as error:
                message = str(error).replace(str(folder), "FOLDER")
            found[name] = {"bytes": size, "message": message, "mb": round((_memory("VmHWM") - before) / 1e6)}
    return found


def _reset_peak() -> None:
    Path("/proc/self/clear_refs").write_text("5")


def _memory(name: str) -> int:
    """A line of /proc/self/status, in bytes."""
    lines = Path("/proc/self/status").read_text().splitlines()
    return next(1024 * int(line.split()[1]) for line in lines if line.startswith(name))


def main() -> int:
    """Measures all of them and writes the record; 1 where one was not refused, or took too much."""
    found = measure(list(BOMBS))
    for name, values in found.items():
        print(f"{name}: {values['bytes']:,} bytes, {values['mb']} MB, {values['message']}")
    refused = sum(values["message"] is not None for values in found.values())
    most = max(values["mb"] for values in found.values())
    figure = f"{refused} of {len(found)} refused in one line; at most {most} MB more memory"
    promise = "A small file that asks for endless memory is refused before the memory is taken."
    write_record("bombs", promise, "tests/test_bombs.py", figure, found)
    return int(refused < len(found) or most > LIMIT_MB)


if __name__ == "__main__":
    sys.exit(main())
