"""Inputs for the two files of an adapter: `adapter_config.json` and `adapter_model.safetensors`."""

from __future__ import annotations

import json
import struct
from dataclasses import asdict
from functools import cache
from math import prod
from pathlib import Path
from random import Random
from typing import Any

from graphlora.adapter_table import CONFIG_FILE, WEIGHTS_FILE, check_table, read_config, read_table
from graphlora.untrusted import MAX_JSON_BYTES
from reliability.fuzz.mutate import mutate, mutate_bytes, mutate_text
from reliability.fuzz.reader import Input, Reader

SIZES = {"F32": 4, "F16": 2, "BF16": 2, "F64": 8, "I64": 8, "U8": 1, "BOOL": 1, "I32": 4}
MODULE = "base_model.model.model.layers.0"
N, R, G, LAYERS, D, F = 3, 2, 4, 2, 4, 6
# Values that mean something somewhere in a configuration, and its own keys besides.
EXTREMES: tuple[Any, ...] = (
    1,
    2,
    1024,
    1025,
    4096,
    10**9,
    0,
    -1,
    0.5,
    1.0,
    1e10,
    [2, 4],
    {"mlp": 4},
    {"(a+)+": 1},
    [[0, 1]],
    [[0, 9]],
    [[1, 1]],
    ["mlp"],
    "mlp",
    {"gate_proj": "w1", "up_proj": "w3", "down_proj": "w2"},
    {"gate_proj": "__class__"},
    [0, 1],
    [-1],
    {"base_model_class": "LlamaForCausalLM", "parent_library": "transformers"},
    {"parent_library": "/tmp/x"},
)


@cache
def _seeds() -> list[dict[str, Any]]:
    from graphlora.tuner.config import GraphLoraConfig
    from graphlora.tuner.presets import PRESETS

    configs = [GraphLoraConfig(task_type="CAUSAL_LM", preset=preset) for preset in PRESETS]
    configs += [
        GraphLoraConfig(
            num_experts=4, edges=[[0, 1], [2, 3]], target_modules=["mlp"], rank_pattern={"mlp": 4}
        ),
        GraphLoraConfig(target_modules=r".*\.mlp", edge_init="learned", alpha_pattern={"a": 2.0}),
        GraphLoraConfig(layers_to_transform=[0, 1], layers_pattern="layers", num_experts_by_layer=[2, 4]),
        GraphLoraConfig(router_type="linear", num_experts_pattern={"mlp": 4}, modules_to_save=["score"]),
    ]
    return [json.loads(json.dumps(config.to_dict())) for config in configs]


@cache
def _words() -> tuple[Any, ...]:
    from graphlora.tuner.config import _CHOICES, _EDGE_INITS
    from graphlora.tuner.presets import PRESETS

    choices = [choice for choices in _CHOICES.values() for choice in choices]
    return (*_seeds()[0], *choices, *_EDGE_INITS, *PRESETS, "CAUSAL_LM", "SEQ_CLS", "LORA", *EXTREMES)


def config_input(rng: Random) -> Input:
    """An `adapter_config.json`, changed."""
    values = mutate(rng.choice(_seeds()), rng, _words())
    text = _json(values)
    if rng.random() < 0.08:
        text = mutate_text(text, rng)
    content = text.encode("utf-8", "surrogatepass")
    return {CONFIG_FILE: mutate_bytes(content, rng) if rng.random() < 0.08 else content}


def _parse_config(folder: Path) -> Path:
    read_config(folder / CONFIG_FILE)
    return folder / CONFIG_FILE


def _validate_config(path: Path) -> None:
    from graphlora.tuner.config import GraphLoraConfig

    # What PEFT's from_pretrained does with the file.
    config = GraphLoraConfig.from_peft_type(**GraphLoraConfig.from_json_file(str(path)))
    assert len(json.dumps(config.to_dict())) < MAX_JSON_BYTES


def _read_config(folder: Path) -> None:
    """Read the configuration as PEFT does, and what was read once more."""
    from graphlora.tuner.config import GraphLoraConfig

    config = GraphLoraConfig.from_pretrained(str(folder))
    again = GraphLoraConfig(**asdict(config))
    assert again.to_dict() == config.to_dict(), "an accepted configuration changes when it is read again"


def _tensors(kind: str) -> dict[str, tuple[str, list[int]]]:
    """The tensors of a small adapter: a graph router on a block, or linear routers on projections."""
    found: dict[str, list[int]] = {}
    block = f"{MODULE}.mlp"
    for name, wide, narrow in (("gate_proj", D, F), ("up_proj", D, F), ("down_proj", F, D)):
        place = f"{block}.graphlora_{name}" if kind == "graph" else f"{block}.{name}.graphlora_experts"
        found |= {f"{place}.lora_A": [N, R, wide], f"{place}.lora_B": [N, narrow, R]}
        if kind != "graph":
            found |= _shared(f"{block}.{name}") | {f"{block}.{name}.graphlora_router.weight": [N, wide]}
    if kind == "graph":
        router = f"{block}.graphlora_router"
        shapes = {
            "token_proj": [G, D],
            "expert_features": [N, G],
            "conv_weight": [LAYERS, G, G],
            "out_proj": [G],
        }
        shapes |= {"self_weight": [LAYERS, G, G], "adjacency": [N, N], "edge_logits": [N * (N - 1) // 2]}
        shapes |= {"logit_offset": [N], "logit_sum": [N], "logit_count": [], "num_updates": []}
        found |= {f"{router}.{name}": shape for name, shape in shapes.items()} | _shared(block)
        attention = f"{MODULE}.self_attn.q_proj.graphlora_attention"
        found |= {f"{attention}.lora_A": [R, D], f"{attention}.lora_B": [D, R]}
    return {name: ("F32", shape) for name, shape in found.items()}


def _shared(place: str) -> dict[str, list[int]]:
    part = f"{place}.graphlora_coordination"
    return {
        f"{part}.poisson_rate_bias": [],
        f"{part}.normal_scale_bias": [],
        f"{part}.cumulative_weights": [N],
    }


def weights_input(rng: Random) -> Input:
    """An adapter whose tensor table is changed; mostly the file stays what safetensors calls valid."""
    kind = rng.choice(("graph", "projection"))
    config: dict[str, Any] = {
        "peft_type": "GRAPHLORA",
        "num_experts": N,
        "r": R,
        "modules_to_save": ["score"],
    }
    config |= {"router_hidden_size": G, "router_num_layers": LAYERS, "task_type": "CAUSAL_LM", "top_k": 2}
    config |= (
        {"target_modules": ["mlp"], "edge_init": "learned", "load_window": "ema"}
        if kind == "graph"
        else {"preset": "ming_moe"}
    )
    tensors = _tensors(kind)
    for _ in range(int(rng.expovariate(1.2))):
        _change_tensor(tensors, rng)
    if rng.random() < 0.25:
        config[
            rng.choice(("num_experts", "r", "router_hidden_size", "router_num_layers", "rank_pattern"))
        ] = rng.choice((1, 2, 4, 10**9, -1, None, "8", {"mlp": 2}, [1]))
    files = {CONFIG_FILE: json.dumps(config).encode(), WEIGHTS_FILE: safetensors_bytes(tensors, rng)}
    if rng.random() < 0.12:
        files[WEIGHTS_FILE] = mutate_bytes(files[WEIGHTS_FILE], rng)
    return files


def _change_tensor(tensors: dict[str, tuple[str, list[int]]], rng: Random) -> None:
    if not tensors:
        return
    name = rng.choice(list(tensors))
    dtype, shape = tensors[name]
    kind = rng.random()
    if kind < 0.35 and shape:
        shape = list(shape)
        shape[rng.randrange(len(shape))] = rng.choice((0, 1, 2, 3, 4, 5, 8, 300))
    elif kind < 0.5:
        shape = rng.choice(
            ([], [1], [0], [0, 10**12], [1] * 12, shape[::-1], shape[1:], [*shape, 1], [N, N], [2**40, 0])
        )
    elif kind < 0.6:
        dtype = rng.choice(list(SIZES))
    elif kind < 0.75:
        del tensors[name]
        words = (
            "lora_A",
            "lora_B",
            "graphlora_router",
            "weight",
            "bias",
            "score",
            "lm_head",
            "lora_B.default",
            "other",
        )
        parts = name.split(".")
        parts[rng.randrange(len(parts))] = rng.choice(words)
        name = ".".join(parts) if rng.random() < 0.7 else mutate_text(name, rng)
    elif kind < 0.85:
        del tensors[name]
        return
    else:
        name = rng.choice(
            ("score.weight", "base_model.model.score.weight", f"{MODULE}.mlp.graphlora_x.y", "x", "\x1b[2J")
        )
    tensors[name] = (dtype, shape)


def safetensors_bytes(tensors: dict[str, tuple[str, list[int]]], rng: Random) -> bytes:
    """The file of these tensors, with zeros or small numbers for values; now and then its head lies."""
    head: dict[str, Any] = {"__metadata__": {"format": "pt"}}
    end = 0
    for name, (dtype, shape) in tensors.items():
        size = min(SIZES[dtype] * prod(shape), 2**20)
        head[name] = {"dtype": dtype, "shape": shape, "data_offsets": [end, end + size]}
        end += size
    if rng.random() < 0.12:
        head = mutate(head, rng, (*SIZES, 0, 10**18, [0, 4], [4, 0], 2**64))
    text = _json(head).encode("utf-8", "surrogatepass")
    text += b" " * (-len(text) % 8)
    length = (
        len(text)
        if rng.random() < 0.97
        else rng.choice((0, 1, len(text) + 8, 2**31, 2**63, 2**64 - 1, 10**8))
    )
    values = bytes(end) if rng.random() < 0.5 else rng.randbytes(min(end, 4096)).ljust(end, b"\0")
    return struct.pack("<Q", length) + text + values


def _parse_weights(folder: Path) -> tuple[Any, dict[str, Any]]:
    return read_table(folder / WEIGHTS_FILE), read_config(folder / CONFIG_FILE)


def _validate_weights(parsed: tuple[Any, dict[str, Any]]) -> None:
    table, config = parsed
    check_table(table, config)
    assert sum(prod(shape) for shape in table.shapes.values()) < 2**20, "tensors larger than their file"


def _load(folder: Path) -> None:
    """Describe the adapter, and load it onto a small model, as `graphlora info` and `graphlora evaluate` do."""
    from transformers import LlamaConfig, LlamaForCausalLM

    from graphlora.cli.info import as_text, describe
    from graphlora.training.adapter_files import read_adapter
    from graphlora.training.loading import load_adapter

    assert as_text(describe(read_adapter(folder))).replace("\n", "").isprintable()
    sizes = {"vocab_size": 8, "hidden_size": D, "intermediate_size": F, "num_hidden_layers": 1}
    heads = {"num_attention_heads": 1, "num_key_value_heads": 1, "max_position_embeddings": 8}
    load_adapter(LlamaForCausalLM(LlamaConfig(**sizes, **heads)), folder)


def _json(values: Any) -> str:
    try:
        return json.dumps(values, ensure_ascii=False)
    except (ValueError, RecursionError):
        return "1" * 5000


CONFIG = Reader(
    name="adapter_config",
    title="adapter_config.json",
    generate=config_input,
    parse=_parse_config,
    validate=_validate_config,
    modules=("tuner/config.py", "tuner/config_checks.py"),
    excluded=("GraphLoraConfig.save_pretrained", "config_field_names"),
    use=_read_config,
)
WEIGHTS = Reader(
    name="safetensors",
    title="adapter_model.safetensors",
    generate=weights_input,
    parse=_parse_weights,
    validate=_validate_weights,
    modules=("adapter_table.py",),
    excluded=("check_folder",),
    use=_load,
)
