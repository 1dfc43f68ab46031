"""The files of a saved adapter, read without torch and without its base model."""

from __future__ import annotations

import math
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from graphlora.adapter_table import (
    CONFIG_FILE,
    METHOD,
    PICKLE_FILE,
    WEIGHT_PREFIX,
    WEIGHTS_FILE,
    check_table,
    read_config,
    read_table,
)
from graphlora.errors import GraphLoraError

if TYPE_CHECKING:
    import numpy as np


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
        import numpy as np
        from safetensors import safe_open

        names = [name for name in self.shapes if name.endswith(ending) and self.dtypes[name] != "BF16"]
        with safe_open(self.path / WEIGHTS_FILE, framework="numpy") as file:
            found = {name: file.get_tensor(name) for name in names}
        for name, values in found.items():
            if not np.isfinite(values).all():
                raise GraphLoraError(f"{self.path / WEIGHTS_FILE}: {name} holds values that are not finite")
        return {
            name.removeprefix(WEIGHT_PREFIX).removesuffix(ending).rstrip("."): values
            for name, values in found.items()
        }


def is_adapter(path: str | Path) -> bool:
    """Whether the directory holds an adapter (or what is left of one)."""
    return (Path(path) / CONFIG_FILE).is_file() or (Path(path) / WEIGHTS_FILE).is_file()


def read_adapter(path: str | Path) -> AdapterFiles:
    """Read an adapter's config and the table of its tensors.

    Raises:
        GraphLoraError: A file is missing, is not what its name says (truncated, tampered with), or the two do not fit
            each other.
    """
    path = Path(path)
    if not path.is_dir():
        raise GraphLoraError(f"no adapter directory at {path}; check the path")
    for name in (CONFIG_FILE, WEIGHTS_FILE):
        if not (path / name).is_file():
            pickled = name == WEIGHTS_FILE and (path / PICKLE_FILE).is_file()
            remedy = (
                f"{PICKLE_FILE} is a pickle file, which is not read (graphlora import reads the authors')"
                if pickled
                else "give the directory that training wrote"
            )
            raise GraphLoraError(f"{path} has no {name}; {remedy}")
    config = read_config(path / CONFIG_FILE)
    table = read_table(path / WEIGHTS_FILE)
    if config["peft_type"] == METHOD:
        check_table(table, config)
    return AdapterFiles(path, config, table.shapes, table.dtypes)
