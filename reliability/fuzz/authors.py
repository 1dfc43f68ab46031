"""Inputs for the importer of the authors' checkpoints: a zip archive of a pickle and raw records, and settings."""

from __future__ import annotations

import io
import json
import pickle
import struct
import zipfile
from math import prod
from pathlib import Path
from random import Random
from typing import Any

from graphlora.tuner.authors_checkpoint import CONFIG_FILE, WEIGHTS_FILE, checked_checkpoint
from graphlora.tuner.import_authors import adapter_config
from graphlora.tuner.tensor_archive import read_tensors
from graphlora.untrusted import read_json_object
from reliability.fuzz.mutate import mutate, mutate_bytes, mutate_text
from reliability.fuzz.reader import Input, Reader

R, D, F, G, LAYERS = 1, 4, 6, 3, 1
SETTINGS: dict[str, Any] = {
    "peft_type": "MIXLORA",
    "r": R,
    "lora_alpha": 4,
    "lora_dropout": 0.0,
    "routing_strategy": "goe",
    "num_experts": 1,
    "top_k": 1,
    "num_gcnlayer": LAYERS,
    "edges_thresholds": 0.25,
    "dim_gcn": G,
    "router_route_loss_coef_": 0.005,
    "router_count_loss_coef_": 8.0,
    "base_model_name_or_path": "base",
    "task_type": "CAUSAL_LM",
}
WORDS = (*SETTINGS, "mixlora", "goe", 1, 2, 0, 10**9, 0.5, -1.0, "4", None)
DTYPES = {"FloatStorage": 4, "HalfStorage": 2, "BFloat16Storage": 2, "DoubleStorage": 8, "LongStorage": 8}
NAMES = (
    "posix system",
    "builtins eval",
    "torch._utils _rebuild_tensor_v2",
    "collections OrderedDict",
    "os",
    "builtins bytearray",
    "torch._utils _rebuild_parameter",
    "torch Tensor",
    "torch FloatStorage",
)
OPCODES = b".(0Q}]tau)Rbes\x85\x86\x87\x88\x89N2\x93\x94\x97\x81"


def _tensors(linear: bool, experts: int) -> dict[str, list[int]]:
    first = "mixlora.layers.0"
    found: dict[str, list[int]] = {}
    for expert in range(experts):
        for name, wide, narrow in (("w1", D, F), ("w3", D, F), ("w2", F, D)):
            place = f"{first}.experts.{expert}.{name}_proj"
            found |= {f"{place}.lora_A.weight": [R, wide], f"{place}.lora_B.weight": [narrow, R]}
    found |= {
        f"{first}.self_attn.q_proj.lora_A.weight": [R, D],
        f"{first}.self_attn.q_proj.lora_B.weight": [D, R],
    }
    if linear:
        return found | {f"{first}.gate.weight": [experts, D]}
    gate = {
        "X": [experts, D],
        "mlp.weight": [G, D],
        "mlp_struct.weight": [G, D],
        "proj.weight": [1, G],
        "lamb": [],
        "theta": [1],
    }
    return (
        found
        | {f"{first}.gate.{name}": shape for name, shape in gate.items()}
        | {f"{first}.gate.convs.0.lin.weight": [G, G]}
    )


def authors_input(rng: Random) -> Input:
    """A checkpoint, changed."""
    linear, experts = rng.random() < 0.4, rng.choice((1, 1, 1, 2))
    settings: Any = SETTINGS | {"num_experts": experts} | ({"routing_strategy": "mixlora"} if linear else {})
    if rng.random() < 0.35:
        settings = mutate(settings, rng, WORDS)
    tensors = _tensors(linear, experts)
    for _ in range(int(rng.expovariate(1.2))):
        _change_table(tensors, rng)
    content = _archive(tensors, rng)
    if rng.random() < 0.08:
        content = mutate_bytes(content, rng)
    return {CONFIG_FILE: _json(settings), WEIGHTS_FILE: content}


def _change_table(tensors: dict[str, list[int]], rng: Random) -> None:
    name = rng.choice(list(tensors) or ["x"])
    shape = tensors.pop(name, [1])
    kind = rng.random()
    if kind < 0.4:
        tensors[name] = rng.choice(
            ([], [1], [0], [0, 4], shape[::-1], [*shape, 1], [1] * 9, [2, 3], [n + 1 for n in shape])
        )
    elif kind < 0.8:
        tensors[_renamed(name, rng)] = shape


def _renamed(name: str, rng: Random) -> str:
    parts = name.split(".")
    words = (
        "0",
        "1",
        "2",
        "9" * 30,
        "gate",
        "weight",
        "lora_A",
        "experts",
        "x",
        "convs",
        "self_attn",
        "layers",
    )
    parts[rng.randrange(len(parts))] = rng.choice(words)
    return ".".join(parts) if rng.random() < 0.7 else mutate_text(name, rng)


def _archive(tensors: dict[str, list[int]], rng: Random) -> bytes:
    """The file of torch.save for these tensors; one description or record in six files is wrong."""
    lie = rng.choice(list(tensors) or [""]) if rng.random() < 0.2 else None
    pieces, records = [], {}
    for key, (name, shape) in enumerate(tensors.items()):
        dtype = "FloatStorage" if rng.random() < 0.9 else rng.choice(list(DTYPES))
        values = [rng.choice((0.0, 0.5, -1.0)) for _ in range(prod(shape))]
        record = struct.pack(f"<{len(values)}f", *values)[: DTYPES[dtype] * len(values)].ljust(
            DTYPES[dtype] * len(values), b"\0"
        )
        stride = [prod(shape[i + 1 :]) for i in range(len(shape))]
        description = {
            "dtype": dtype,
            "key": str(key),
            "count": len(values),
            "offset": 0,
            "size": shape,
            "stride": stride,
        }
        if name == lie:
            record = _lie(description, record, rng)
        records[f"archive/data/{key}"] = record
        pieces.append(_text(name) + _tensor(description))
    head = pickle.PROTO + b"\x02" + pickle.EMPTY_DICT + pickle.MARK
    stream = head + b"".join(pieces) + pickle.SETITEMS + pickle.STOP
    if rng.random() < 0.12:
        stream = _change_pickle(stream, rng)
    return _zipped(
        {"archive/data.pkl": stream, "archive/byteorder": b"little", **records, "archive/version": b"3\n"},
        rng,
    )


def _lie(description: dict[str, Any], record: bytes, rng: Random) -> bytes:
    kind = rng.random()
    if kind < 0.25:
        return mutate_bytes(record, rng)
    field = rng.choice(("dtype", "key", "count", "offset", "size", "stride"))
    values: dict[str, tuple[Any, ...]] = {
        "dtype": tuple(DTYPES),
        "key": ("0", "../data.pkl", "99", ""),
        "count": (0, 1, 10**9, -1, 2**31 - 1),
        "offset": (1, 10**9, -1),
        "size": ([10**9], [2**20, 2**20], [-1], [0], [1, 2, 3], []),
        "stride": ([0, 0], [0], [-1, 1], [10**9, 1], [1, 1]),
    }
    description[field] = rng.choice(values[field])
    return record


def _tensor(description: dict[str, Any]) -> bytes:
    size, stride = (b"(" + b"".join(map(_int, description[name])) + b"t" for name in ("size", "stride"))
    storage = (
        b"("
        + _text("storage")
        + _global(f"torch {description['dtype']}")
        + _text(description["key"])
        + _text("cpu")
    )
    storage += _int(description["count"]) + b"tQ"
    table = _global("collections OrderedDict") + b")R"
    arguments = b"(" + storage + _int(description["offset"]) + size + stride + pickle.NEWFALSE + table + b"t"
    return _global("torch._utils _rebuild_tensor_v2") + arguments + b"R"


def _change_pickle(stream: bytes, rng: Random) -> bytes:
    kind = rng.random()
    place = rng.randrange(len(stream) + 1)
    if kind < 0.35:
        return stream[:place] + bytes([rng.choice(OPCODES)]) + stream[place:]
    if kind < 0.6:
        return stream.replace(_global("torch._utils _rebuild_tensor_v2"), _global(rng.choice(NAMES)), 1)
    if kind < 0.7:
        return stream[:-1] + b"q" + bytes([rng.randrange(256)]) + b"h" + bytes([rng.randrange(256)]) + b"."
    if kind < 0.8:
        return pickle.dumps(
            rng.choice(([1], {"a": {"b": 1}}, {1: 2}, "x", {"a": 1.5})), protocol=rng.choice((0, 1, 2, 4))
        )
    return mutate_bytes(stream, rng)


def _zipped(files: dict[str, bytes], rng: Random) -> bytes:
    out = io.BytesIO()
    method = zipfile.ZIP_DEFLATED if rng.random() < 0.02 else zipfile.ZIP_STORED
    if rng.random() < 0.04:
        files.pop(rng.choice(list(files)))
    with zipfile.ZipFile(out, "w", method) as archive:
        for name, content in files.items():
            archive.writestr(zipfile.ZipInfo(name if rng.random() > 0.002 else f"../{name}"), content, method)
    return out.getvalue()


def _global(name: str) -> bytes:
    return b"c" + name.replace(" ", "\n").encode() + b"\n"


def _text(text: str) -> bytes:
    content = text.encode("utf-8", "surrogatepass")
    return pickle.BINUNICODE + struct.pack("<I", len(content)) + content


def _int(value: int) -> bytes:
    if -(2**31) <= value < 2**31:
        return pickle.BININT + struct.pack("<i", value)
    return pickle.LONG1 + b"\x09" + value.to_bytes(9, "little", signed=True)


def _json(value: Any) -> bytes:
    try:
        return json.dumps(value).encode()
    except (ValueError, RecursionError):
        return b"1" * 5000


def _parse(folder: Path) -> Any:
    return (
        folder,
        read_json_object(folder / CONFIG_FILE, "an adapter's configuration"),
        read_tensors(folder / WEIGHTS_FILE),
    )


def _validate(parsed: Any) -> None:
    adapter_config(checked_checkpoint(*parsed), None)


AUTHORS = Reader(
    name="authors",
    title="the authors' checkpoints",
    generate=authors_input,
    parse=_parse,
    validate=_validate,
    modules=("tuner/authors_checkpoint.py", "tuner/tensor_archive.py"),
    excluded=("read_checkpoint",),
)
