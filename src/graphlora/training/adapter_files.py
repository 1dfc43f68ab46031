"""The files of a saved adapter, read without torch and without its base model."""

from __future__ import annotations

import json
import math
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from graphlora.errors import GraphLoraError

if TYPE_CHECKING:
    import numpy as np

CONFIG_FILE = "adapter_config.json"
WEIGHTS_FILE = "adapter_model.safetensors"
WEIGHT_PREFIX = "base_model.model."


@dataclass(frozen=True)
class AdapterFiles:
    """A saved adapter.

    Attributes:
        path: Its directory.
        config: Contents of `adapter_config.json`.
        shapes: Shape of each tensor in the weights file.
        dtypes: Dtype of each tensor, in safetensors' names (`"F32"`, `"BF16"`, ...).
    """

    path: Path
    config: dict[str, Any]
    shapes: dict[str, tuple[int, ...]]
    dtypes: dict[str, str]

    @property
    def num_parameters(self) -> int:
        """Values stored in the weights file."""
        return sum(math.prod(shape) for shape in self.shapes.values())

    @property
    def num_bytes(self) -> int:
        """Size of the weights file."""
        return (self.path / WEIGHTS_FILE).stat().st_size

    @property
    def base_model(self) -> str | None:
        """Base model that the adapter was trained on, as recorded by PEFT."""
        return self.config.get("base_model_name_or_path")

    def tensors(self, ending: str) -> dict[str, np.ndarray]:
        """Float tensors whose name ends so, by the name of their module (bfloat16 ones are left out)."""
        from safetensors import safe_open

        names = [name for name in self.shapes if name.endswith(ending) and self.dtypes[name] != "BF16"]
        with safe_open(self.path / WEIGHTS_FILE, framework="numpy") as file:
            return {
                name.removeprefix(WEIGHT_PREFIX).removesuffix(ending).rstrip("."): file.get_tensor(name)
                for name in names
            }


def is_adapter(path: str | Path) -> bool:
    """Whether the directory holds an adapter (or what is left of one)."""
    return (Path(path) / CONFIG_FILE).is_file() or (Path(path) / WEIGHTS_FILE).is_file()


def read_adapter(path: str | Path) -> AdapterFiles:
    """Read an adapter's config and the table of its tensors.

    Raises:
        GraphLoraError: A file is missing, or is not what its name says (truncated, tampered with).
    """
    path = Path(path)
    if not path.is_dir():
        raise GraphLoraError(f"no adapter directory at {path}; check the path")
    for name in (CONFIG_FILE, WEIGHTS_FILE):
        if not (path / name).is_file():
            raise GraphLoraError(f"{path} has no {name}; give the directory that training wrote")
    try:
        config = json.loads((path / CONFIG_FILE).read_text(encoding="utf-8"))
    except (OSError, UnicodeDecodeError, json.JSONDecodeError) as error:
        raise GraphLoraError(f"{path / CONFIG_FILE} is broken: {error}; restore it from a copy") from error
    if not isinstance(config, dict) or "peft_type" not in config:
        raise GraphLoraError(f"{path / CONFIG_FILE} names no peft_type; it is not an adapter's config")
    shapes, dtypes = _tensor_table(path / WEIGHTS_FILE)
    return AdapterFiles(path, config, shapes, dtypes)


def _tensor_table(path: Path) -> tuple[dict[str, tuple[int, ...]], dict[str, str]]:
    from safetensors import SafetensorError, safe_open

    shapes, dtypes = {}, {}
    try:
        with safe_open(path, framework="numpy") as file:
            for name in file.keys():  # noqa: SIM118 - the file is no mapping
                part = file.get_slice(name)
                shapes[name], dtypes[name] = tuple(part.get_shape()), part.get_dtype()
    except (SafetensorError, OSError) as error:
        raise GraphLoraError(
            f"{path} is truncated or damaged ({error}); restore it from a copy or a checkpoint"
        ) from error
    return shapes, dtypes
