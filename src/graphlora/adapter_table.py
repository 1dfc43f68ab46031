"""The files of a saved adapter as a table: its configuration, and name, shape and dtype of every tensor.

Both are checked against each other before anything is built or loaded, so that neither can ask for memory that the
other does not account for. Imports no torch, and reads the head of the weights file only.
"""

from __future__ import annotations

import re
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from graphlora.errors import GraphLoraError, one_line
from graphlora.untrusted import read_json_object

CONFIG_FILE = "adapter_config.json"
WEIGHTS_FILE = "adapter_model.safetensors"
PICKLE_FILE = "adapter_model.bin"
MANIFEST_FILE = "manifest.json"
WEIGHT_PREFIX = "base_model.model."
METHOD = "GRAPHLORA"
MAX_HEADER_BYTES = 16 * 2**20
# PEFT saves these whole where the vocabulary was changed.
EMBEDDINGS = ("embed_tokens", "lm_head")
FLOATS = ("F64", "F32", "F16", "BF16")
_KEY = re.compile(r"[A-Za-z_]\w{0,99}", re.ASCII)
_TENSOR = re.compile(r"(.+)\.graphlora_(\w+)\.(\w+)")
# Sizes by name: N experts, r rank, g router width, L router layers, P pairs of experts, 1 shared by all, * any.
_LINEAR = {"lora_A": ("r *",), "lora_B": ("* r",)}
_EXPERTS = {"lora_A": ("N r *", "1 r *"), "lora_B": ("N * r",)}
_ROUTER = {
    "token_proj": ("g *",),
    "expert_features": ("N g", "N *"),
    "expert_proj": ("g *",),
    "conv_weight": ("L g g",),
    "self_weight": ("L g g",),
    "attention": ("L 2 g",),
    "out_proj": ("g",),
    "adjacency": ("N N",),
    "edge_logits": ("P",),
    "weight": ("N *",),
    "bias": ("N",),
    "logit_offset": ("N",),
    "logit_sum": ("N",),
    "logit_count": ("",),
    "num_updates": ("",),
    "sparsity_proj": ("g *",),
    "sparsity_proj_bias": ("g",),
    "sparsity_out": ("g",),
    "sparsity_out_bias": ("",),
}
_COORDINATION = {"poisson_rate_bias": ("",), "normal_scale_bias": ("",), "cumulative_weights": ("N",)}
_PARTS = {"attention": _LINEAR, "router": _ROUTER, "coordination": _COORDINATION}
_EXPERT_PARTS = ("experts", "gate_proj", "up_proj", "gate_up_proj", "down_proj")


@dataclass(frozen=True)
class TensorTable:
    """What a safetensors file holds, by tensor name.

    Attributes:
        path: The file.
        shapes: Shape of each tensor.
        dtypes: Dtype of each, in safetensors' names (`"F32"`, `"BF16"`, ...).
    """

    path: Path
    shapes: dict[str, tuple[int, ...]]
    dtypes: dict[str, str]


def read_config(path: Path) -> dict[str, Any]:
    """The values of an `adapter_config.json` of any method.

    Raises:
        GraphLoraError: The file is damaged or too large, or is no adapter's configuration.
    """
    values = read_json_object(path, "an adapter's configuration")
    if not isinstance(values.get("peft_type"), str):
        raise GraphLoraError(f"{path} names no peft_type; it is not an adapter's config")
    for key in values:
        if not _KEY.fullmatch(key):
            raise GraphLoraError(f"{path}: {one_line(repr(key), 600)} is no option of an adapter; remove it")
    values.pop("runtime_config", None)
    return values


def read_table(path: Path) -> TensorTable:
    """The table of a safetensors file, whose values are not read.

    Raises:
        GraphLoraError: The file cannot be read, is truncated or damaged, or its head is larger than any adapter's.
    """
    from safetensors import SafetensorError, safe_open

    shapes, dtypes = {}, {}
    try:
        with path.open("rb") as head:
            length = int.from_bytes(head.read(8), "little")
        if length > MAX_HEADER_BYTES:
            raise SafetensorError(f"its head says that it is {length} bytes long")
        with safe_open(path, framework="numpy") as file:
            for name in file.keys():  # noqa: SIM118 - the file is no mapping
                part = file.get_slice(name)
                shapes[name], dtypes[name] = tuple(part.get_shape()), part.get_dtype()
    except (SafetensorError, OSError) as error:
        raise GraphLoraError(
            f"{path} is truncated or damaged ({error}); restore it from a copy or a checkpoint"
        ) from error
    return TensorTable(path, shapes, dtypes)


def check_folder(folder: Path, config: dict[str, Any]) -> None:
    """Check the weights that lie beside an `adapter_config.json`, where there are any.

    Raises:
        GraphLoraError: See `check_table`; or the weights are a pickle file, or a trained adapter's are missing.
    """
    if (folder / WEIGHTS_FILE).is_file():
        check_table(read_table(folder / WEIGHTS_FILE), config)
    elif (folder / PICKLE_FILE).is_file():
        raise GraphLoraError(
            f"{folder} has {PICKLE_FILE}, a pickle file, which is not read; GraphLoRA adapters are {WEIGHTS_FILE}. "
            "A checkpoint of the authors' code is turned into one by: graphlora import"
        )
    elif (folder / MANIFEST_FILE).is_file():
        raise GraphLoraError(
            f"{folder} has no {WEIGHTS_FILE}, but the {MANIFEST_FILE} of a trained adapter; restore it from a copy"
        )


def check_top_k(top_k: int, num_experts: int) -> None:
    """Raise `GraphLoraError` where a token would use more experts than there are."""
    if top_k > num_experts:
        remedy = f"top_k between 1 and {num_experts}" if num_experts > 1 else "top_k=1, or more experts"
        raise GraphLoraError(f"top_k={top_k} is larger than num_experts={num_experts}; choose {remedy}.")


def check_table(table: TensorTable, config: dict[str, Any]) -> None:
    """Check that a GraphLoRA adapter's tensors are those that its configuration asks for.

    Args:
        table: The tensors.
        config: Values of its `adapter_config.json`. A size that it does not name may be any, the same everywhere.

    Raises:
        GraphLoraError: Names the first tensor that does not fit, with what it should be.
    """
    sizes = _Sizes(config)
    saved = config.get("modules_to_save")
    whole = [*EMBEDDINGS, *(name for name in (saved if isinstance(saved, (list, tuple)) else ()))]
    if not any(_TENSOR.fullmatch(name) for name in table.shapes):
        raise GraphLoraError(f"{table.path} holds no tensor of a GraphLoRA adapter; it is another file")
    for name, shape in table.shapes.items():
        where = f"{table.path}: {one_line(name, 600)}"
        if table.dtypes[name] not in FLOATS:
            raise GraphLoraError(
                f"{where} is of dtype {table.dtypes[name]}; adapters are {', '.join(FLOATS)}"
            )
        if 0 in shape and not name.endswith(".edge_logits"):
            raise GraphLoraError(f"{where} has shape {list(shape)}, which holds nothing")
        found = _TENSOR.fullmatch(name)
        forms = None if found is None else _forms(found[2], found[3])
        if found is not None and forms is not None:
            sizes.check(where, found[1], shape, forms)
        elif not name.isprintable() or not any(f".{module}." in f".{name}" for module in whole):
            raise GraphLoraError(f"{where} is no tensor of a GraphLoRA adapter, nor of modules_to_save")


def _forms(part: str, name: str) -> tuple[str, ...] | None:
    tensors = _EXPERTS if part in _EXPERT_PARTS else _PARTS.get(part, {})
    return tensors.get(name)


@dataclass
class _Sizes:
    """The sizes that a configuration allows, and those that the tensors of each module have shown."""

    config: dict[str, Any]
    seen: dict[tuple[str, str], int] = field(default_factory=dict)
    allowed: dict[str, set[int]] = field(default_factory=dict)

    def __post_init__(self) -> None:
        config = self.config
        self.allowed = {
            "N": _numbers(config, "num_experts", "num_experts_by_layer", "num_experts_pattern"),
            "r": _numbers(config, "r", "rank_pattern"),
            "g": _numbers(config, "router_hidden_size"),
            "L": _numbers(config, "router_num_layers"),
        }

    def check(self, where: str, module: str, shape: tuple[int, ...], forms: tuple[str, ...]) -> None:
        for form in forms:
            if self._fits(module, shape, form.split()):
                return
        wanted = " or ".join(f"[{self._shown(module, form)}]" for form in forms)
        raise GraphLoraError(f"{where} has shape {list(shape)}; {CONFIG_FILE} asks for {wanted}")

    def _fits(self, module: str, shape: tuple[int, ...], symbols: list[str]) -> bool:
        if len(shape) != len(symbols):
            return False
        bound: dict[str, int] = {}
        for size, symbol in zip(shape, symbols, strict=True):
            if symbol == "*":
                continue
            if symbol.isdigit():
                if size != int(symbol):
                    return False
                continue
            name, value = ("N", _experts_of(size)) if symbol == "P" else (symbol, size)
            known = self.seen.get((module, name)) if name == "N" else None
            allowed = {known} if known is not None else self.allowed[name]
            if (allowed and value not in allowed) or bound.setdefault(name, value) != value:
                return False
        if "N" in bound:
            self.seen[module, "N"] = bound["N"]
        return True

    def _shown(self, module: str, form: str) -> str:
        return ", ".join(self._shown_size(module, symbol) for symbol in form.split())

    def _shown_size(self, module: str, symbol: str) -> str:
        if symbol == "*":
            return "any"
        name = "N" if symbol == "P" else symbol
        known = self.seen.get((module, name))
        counts = [known] if known is not None else sorted(self.allowed.get(name, ()))
        if symbol == "P":
            counts = [count * (count - 1) // 2 for count in counts]
        return " or ".join(map(str, counts[:8])) or symbol


def _experts_of(pairs: int) -> int:
    """N of `N (N - 1) / 2` pairs; 0 where there is none."""
    count = int((1 + (1 + 8 * min(pairs, 2**40)) ** 0.5) / 2)
    return count if count * (count - 1) // 2 == pairs else 0


def _numbers(config: dict[str, Any], *names: str) -> set[int]:
    """The whole numbers under these names; none, for any, where the first one is not given."""
    if type(config.get(names[0])) is not int:
        return set()
    found: set[int] = set()
    for name in names:
        value = config.get(name)
        parts = (
            value.values()
            if isinstance(value, dict)
            else value
            if isinstance(value, (list, tuple))
            else [value]
        )
        found |= {part for part in parts if type(part) is int}
    return found
