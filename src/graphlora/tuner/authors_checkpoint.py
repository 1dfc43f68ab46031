"""Reading a checkpoint that the authors' released code wrote: two files, keys and shapes checked before use."""

from __future__ import annotations

import re
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from torch import Tensor

from graphlora.errors import GraphLoraError
from graphlora.tuner.tensor_archive import read_tensors
from graphlora.untrusted import read_json_object

WEIGHTS_FILE, CONFIG_FILE = "adapter_model.bin", "adapter_config.json"
# Their names of the FFN's projections.
PROJECTIONS = {"gate_proj": "w1", "up_proj": "w3", "down_proj": "w2"}
_ROUTER_TYPES = {"goe": "graph", "mixlora": "linear"}
_LAYER = re.compile(r"mixlora\.layers\.(\d{1,4})\.(.+)", re.ASCII)
_ATTENTION = re.compile(r"(self_attn\.\w+)\.lora_[AB]\.weight")
_CONV = re.compile(r"gate\.convs\.(\d+)\.lin\.weight")


@dataclass(frozen=True)
class AuthorsCheckpoint:
    """A checkpoint whose tensors have the shapes that its sizes ask for.

    Attributes:
        path: its directory.
        settings: contents of its `adapter_config.json`.
        layers: tensors of each layer, float32, by their name without `mixlora.layers.{l}.`.
        router_type: `"graph"` or `"linear"`.
        num_experts: N.
        r: rank.
        hidden_size: d.
        intermediate_size: f.
        router_hidden_size: g; 0 for a linear router.
        router_num_layers: graph convolution layers; 0 for a linear router.
        attention: adapted attention projections, e.g. `self_attn.q_proj`.
    """

    path: Path
    settings: dict[str, Any]
    layers: list[dict[str, Tensor]]
    router_type: str
    num_experts: int
    r: int
    hidden_size: int
    intermediate_size: int
    router_hidden_size: int
    router_num_layers: int
    attention: tuple[str, ...]

    def setting(self, name: str) -> Any:
        """A value of the configuration.

        Raises:
            GraphLoraError: where it is not there.
        """
        if name not in self.settings:
            raise GraphLoraError(
                f"{self.path / CONFIG_FILE} has no {name!r}; add the value it was trained with."
            )
        return self.settings[name]


def read_checkpoint(source_dir: Path) -> AuthorsCheckpoint:
    """Reads and checks a checkpoint; its pickle is never run, see `tensor_archive`.

    Raises:
        GraphLoraError: for a file that is missing, damaged or not theirs, and for tensors that do not fit together.
    """
    for name in (CONFIG_FILE, WEIGHTS_FILE):
        if not (source_dir / name).is_file():
            raise GraphLoraError(
                f"{source_dir} has no {name}; give the directory that the authors' code wrote."
            )
    settings = read_json_object(source_dir / CONFIG_FILE, "an adapter's configuration")
    return checked_checkpoint(source_dir, settings, read_tensors(source_dir / WEIGHTS_FILE))


def checked_checkpoint(
    source_dir: Path, settings: dict[str, Any], tensors: dict[str, Tensor]
) -> AuthorsCheckpoint:
    """A checkpoint from what its two files hold; see `read_checkpoint`.

    Raises:
        GraphLoraError: for settings or tensors that are not theirs, or do not fit together.
    """
    layers = _by_layer(tensors, source_dir / WEIGHTS_FILE)
    strategy = settings.get("routing_strategy")
    if not isinstance(strategy, str) or strategy not in _ROUTER_TYPES:
        raise GraphLoraError(
            f"{source_dir / CONFIG_FILE}: routing_strategy={strategy!r} cannot be imported; "
            f"known are {', '.join(map(repr, _ROUTER_TYPES))}."
        )
    checkpoint = _with_sizes(source_dir, settings, layers, _ROUTER_TYPES[strategy])
    _check_shapes(checkpoint)
    return checkpoint


def _by_layer(tensors: dict[str, Tensor], path: Path) -> list[dict[str, Tensor]]:
    layers: dict[int, dict[str, Tensor]] = {}
    for key, tensor in tensors.items():
        match = _LAYER.fullmatch(key)
        if match is None:
            break
        layers.setdefault(int(match[1]), {})[match[2]] = tensor
    else:
        missing = sorted(set(range(max(layers, default=-1) + 1)) - set(layers))
        if missing:
            raise GraphLoraError(f"{path} has no tensors of layer {missing[0]}, but of layer {max(layers)}.")
        if layers:
            return [layers[i] for i in range(len(layers))]
    shown = ", ".join(list(tensors)[:4]) or "none"
    raise GraphLoraError(
        f"{path} is not a checkpoint of the authors' code, whose tensors are named mixlora.layers.0...; "
        f"it has {len(tensors)}: {shown}{', ...' if len(tensors) > 4 else ''}."
    )


def _with_sizes(
    path: Path, settings: dict[str, Any], layers: list[dict[str, Tensor]], router_type: str
) -> AuthorsCheckpoint:
    """Takes the sizes from the first layer's matrices; `_check_shapes` compares everything else with them."""
    first = layers[0]
    r, hidden_size = _matrix(path, first, "experts.0.w1_proj.lora_A.weight")
    intermediate_size, _ = _matrix(path, first, "experts.0.w1_proj.lora_B.weight")
    num_experts, router_hidden_size, router_num_layers = 0, 0, 0
    if router_type == "graph":
        num_experts, _ = _matrix(path, first, "gate.X")
        router_hidden_size, _ = _matrix(path, first, "gate.mlp.weight")
        router_num_layers = sum(_CONV.fullmatch(name) is not None for name in first)
    else:
        num_experts, _ = _matrix(path, first, "gate.weight")
    matches = (_ATTENTION.fullmatch(name) for name in first)
    attention = tuple(sorted({match[1] for match in matches if match}))
    return AuthorsCheckpoint(
        path, settings, layers, router_type, num_experts, r, hidden_size, intermediate_size,
        router_hidden_size, router_num_layers, attention,
    )  # fmt: skip


def _matrix(path: Path, tensors: dict[str, Tensor], name: str) -> tuple[int, int]:
    if name not in tensors or tensors[name].dim() != 2:
        raise GraphLoraError(
            f"{path / WEIGHTS_FILE} has no matrix mixlora.layers.0.{name}; the file is incomplete."
        )
    rows, columns = tensors[name].shape
    return rows, columns


def _check_shapes(checkpoint: AuthorsCheckpoint) -> None:
    path = checkpoint.path / WEIGHTS_FILE
    for name, found in (("num_experts", checkpoint.num_experts), ("r", checkpoint.r)):
        if checkpoint.setting(name) != found:
            raise GraphLoraError(
                f"{checkpoint.path / CONFIG_FILE} says {name}={checkpoint.setting(name)!r}, but {path} holds {found}."
            )
    expected = expected_shapes(checkpoint)
    for i, tensors in enumerate(checkpoint.layers):
        for name in sorted({*expected, *tensors}):
            key = f"mixlora.layers.{i}.{name}"
            if name not in tensors:
                raise GraphLoraError(f"{path} has no {key}; the file is incomplete.")
            if name not in expected:
                raise GraphLoraError(f"{path}: {key} is not a tensor that can be imported.")
            if tuple(tensors[name].shape) not in expected[name]:
                raise GraphLoraError(
                    f"{path}: {key} has shape {list(tensors[name].shape)}, expected {list(expected[name][0])}."
                )
            if not tensors[name].isfinite().all():
                raise GraphLoraError(f"{path}: {key} holds values that are not finite.")


def expected_shapes(checkpoint: AuthorsCheckpoint) -> dict[str, tuple[tuple[int, ...], ...]]:
    """Shapes that a layer's tensors may have, by name; scalars may be `[]` or `[1]`."""
    n, r, d, f = checkpoint.num_experts, checkpoint.r, checkpoint.hidden_size, checkpoint.intermediate_size
    g = checkpoint.router_hidden_size
    shapes: dict[str, tuple[tuple[int, ...], ...]] = {}
    for e in range(n):
        for name, (wide, narrow) in {"w1": (d, f), "w3": (d, f), "w2": (f, d)}.items():
            shapes[f"experts.{e}.{name}_proj.lora_A.weight"] = ((r, wide),)
            shapes[f"experts.{e}.{name}_proj.lora_B.weight"] = ((narrow, r),)
    for name in checkpoint.attention:
        pair = [checkpoint.layers[0].get(f"{name}.lora_{which}.weight") for which in "AB"]
        into, out = (
            0 if t is None or t.dim() != 2 else t.shape[i] for t, i in zip(pair, (1, 0), strict=True)
        )
        shapes[f"{name}.lora_A.weight"] = ((r, into),)
        shapes[f"{name}.lora_B.weight"] = ((out, r),)
    if checkpoint.router_type == "linear":
        return {**shapes, "gate.weight": ((n, d),)}
    convs = {f"gate.convs.{i}.lin.weight": ((g, g),) for i in range(max(checkpoint.router_num_layers, 1))}
    return {
        **shapes,
        **convs,
        "gate.X": ((n, d),),
        "gate.mlp.weight": ((g, d),),
        "gate.mlp_struct.weight": ((g, d),),
        "gate.proj.weight": ((1, g),),
        "gate.lamb": ((), (1,)),
        "gate.theta": ((1,), ()),
    }
