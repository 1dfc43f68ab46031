"""From a checkpoint of the authors' released code to a PEFT adapter with `preset="released"`.

Only the checkpoint's own two files are needed, not the base model's weights. FFN blocks and attention are named as in
Llama-like models: `model.layers.{l}.mlp` and `model.layers.{l}.self_attn`.
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import save_file
from torch import Tensor

from graphlora.errors import GraphLoraError
from graphlora.tuner.authors_checkpoint import (
    PROJECTIONS,
    AuthorsCheckpoint,
    read_checkpoint,
)
from graphlora.tuner.authors_graphs import Edges, given_graphs, rebuilt_graphs
from graphlora.tuner.config import GraphLoraConfig
from graphlora.untrusted import read_json_object

_REBUILT = (
    "the checkpoint holds no graph, so the expert graph was rebuilt from the stored expert projection, as the released "
    "code does on loading. Training moves that projection: the graph may differ from the one trained with. "
    "Give that one as graph (--graph) where you have it."
)
_LINEAR = (
    "the checkpoint has linear routers; their balance loss is not part of this import, so further training has no "
    "auxiliary loss."
)


@dataclass(frozen=True)
class ImportedAdapter:
    """What `import_checkpoint` wrote.

    Attributes:
        path: directory of the adapter.
        config: its configuration.
        num_layers: number of FFN blocks.
        notes: what the user should know about the import, one sentence or two each.
    """

    path: Path
    config: GraphLoraConfig
    num_layers: int
    notes: tuple[str, ...]


def import_checkpoint(
    source_dir: str | Path,
    output_dir: str | Path,
    *,
    base_model: str | None = None,
    graph: str | Path | Edges | None = None,
) -> ImportedAdapter:
    """Writes `adapter_model.safetensors` and `adapter_config.json` for `PeftModel.from_pretrained`.

    Args:
        source_dir: directory with the authors' `adapter_model.bin` and `adapter_config.json`.
        output_dir: directory for the adapter; new or empty.
        base_model: directory or hub id of the base model; by default the one that the checkpoint names. Where its
            `config.json` is on this disk, sizes are compared with it.
        graph: the graph trained with. Edges `[[0, 1], [2, 5]]` for all layers; or a `.json` file with such a list or
            with one per layer, `{"0": [[0, 1]], "1": []}`; or a `.safetensors` file with `layers.{l}.adjacency`,
            `[N, N]` or with the token node last `[N + 1, N + 1]`, of zeros and ones. Otherwise it is rebuilt.

    Returns:
        What was written, with notes for the user.

    Raises:
        GraphLoraError: for files that are missing, damaged, not the authors', or do not fit together.
    """
    output = Path(output_dir)
    if output.exists() and (not output.is_dir() or any(output.iterdir())):
        raise GraphLoraError(f"{output} exists and is not empty; choose another directory.")
    checkpoint = read_checkpoint(Path(source_dir))
    name = base_model or checkpoint.settings.get("base_model_name_or_path")
    if name is not None and not isinstance(name, str):
        raise GraphLoraError(f"base_model_name_or_path={name!r} is no name; give base_model (--base_model).")
    base_config = _base_config(name)
    if base_config is not None:
        _check_base(checkpoint, base_config, str(name))
    config = adapter_config(checkpoint, name)
    notes: list[str] = []
    graphs: list[Tensor] = []
    if checkpoint.router_type == "linear":
        if graph is not None:
            raise GraphLoraError(
                f"graph was given, but the routers in {checkpoint.path} are linear; leave it out."
            )
        notes.append(_LINEAR)
    elif graph is not None:
        graphs = given_graphs(graph, len(checkpoint.layers), checkpoint.num_experts)
    else:
        act_name = str((base_config or {}).get("hidden_act", "silu"))
        graphs = rebuilt_graphs(checkpoint, act_name, config.edge_density or 0.0)
        notes.append(_REBUILT)
    state = _adapter_state(checkpoint, graphs)
    try:
        output.mkdir(parents=True, exist_ok=True)
        save_file(state, output / "adapter_model.safetensors", metadata={"format": "pt"})
        config.save_pretrained(str(output))
    except (OSError, SafetensorError) as error:
        raise GraphLoraError(f"cannot write the adapter to {output}: {error}") from error
    return ImportedAdapter(output, config, len(checkpoint.layers), tuple(notes))


def _base_config(name: str | None) -> dict[str, Any] | None:
    path = Path(name or "") / "config.json"
    if not name or not path.is_file():
        return None
    return read_json_object(path, "a model's configuration")


def _check_base(checkpoint: AuthorsCheckpoint, base_config: dict[str, Any], name: str) -> None:
    sizes = {
        "hidden_size": checkpoint.hidden_size,
        "intermediate_size": checkpoint.intermediate_size,
        "num_hidden_layers": len(checkpoint.layers),
    }
    for field, found in sizes.items():
        if base_config.get(field, found) != found:
            raise GraphLoraError(
                f"{checkpoint.path} does not fit the base model {name}: {field} is {found} in the checkpoint and "
                f"{base_config[field]} in the model; give the base model it was trained on."
            )


def adapter_config(checkpoint: AuthorsCheckpoint, base_model: str | None) -> GraphLoraConfig:
    """The adapter's configuration that a checkpoint stands for.

    Raises:
        GraphLoraError: for settings that are missing, or that cannot work.
    """
    graph = checkpoint.router_type == "graph"
    router: dict[str, Any] = {"router_poisson_loss_coef": 0.0, "router_normal_loss_coef": 0.0}
    if graph:
        router = {
            "router_num_layers": checkpoint.router_num_layers,
            "router_hidden_size": checkpoint.router_hidden_size,
            "edge_density": checkpoint.setting("edges_thresholds"),
            "router_poisson_loss_coef": checkpoint.setting("router_route_loss_coef_"),
            "router_normal_loss_coef": checkpoint.setting("router_count_loss_coef_"),
        }
    return GraphLoraConfig(
        preset="released",
        task_type="CAUSAL_LM",
        base_model_name_or_path=_where(base_model),
        inference_mode=True,
        num_experts=checkpoint.num_experts,
        top_k=checkpoint.setting("top_k"),
        r=checkpoint.r,
        lora_alpha=checkpoint.setting("lora_alpha"),
        lora_dropout=checkpoint.setting("lora_dropout"),
        target_modules=["mlp"],
        attention_target_modules=list(checkpoint.attention),
        router_type=checkpoint.router_type,  # pyright: ignore[reportArgumentType]  # one of the two
        **router,
    )


def _where(base_model: str | None) -> str | None:
    """An absolute path where the model is on this disk, so that the adapter finds it from anywhere."""
    return str(Path(base_model).resolve()) if base_model and Path(base_model).is_dir() else base_model


def _adapter_state(checkpoint: AuthorsCheckpoint, graphs: list[Tensor]) -> dict[str, Tensor]:
    """All tensors of the adapter under PEFT's names."""
    state: dict[str, Tensor] = {}
    for i, layer in enumerate(checkpoint.layers):
        block = f"base_model.model.model.layers.{i}"
        for name in checkpoint.attention:
            for which in ("lora_A", "lora_B"):
                state[f"{block}.{name}.graphlora_attention.{which}"] = layer[f"{name}.{which}.weight"]
        for name, theirs in PROJECTIONS.items():
            for which in ("lora_A", "lora_B"):
                experts = [
                    layer[f"experts.{e}.{theirs}_proj.{which}.weight"] for e in range(checkpoint.num_experts)
                ]
                state[f"{block}.mlp.graphlora_{name}.{which}"] = torch.stack(experts)
        router = {"weight": layer["gate.weight"]} if not graphs else _graph_router(layer, graphs[i])
        for name, tensor in {**router, **_coordination(layer, checkpoint.num_experts)}.items():
            part = name if name.startswith("graphlora_") else f"graphlora_router.{name}"
            state[f"{block}.mlp.{part}"] = tensor
    return {name: tensor.contiguous().clone() for name, tensor in state.items()}


def _graph_router(layer: dict[str, Tensor], adjacency: Tensor) -> dict[str, Tensor]:
    convs = [layer[f"gate.convs.{i}.lin.weight"] for i in range(sum(".convs." in name for name in layer))]
    return {
        "expert_features": layer["gate.X"],
        "token_proj": layer["gate.mlp.weight"],
        "expert_proj": layer["gate.mlp_struct.weight"],
        "conv_weight": torch.stack(convs),
        "out_proj": layer["gate.proj.weight"][0],
        "adjacency": adjacency,
    }


def _coordination(layer: dict[str, Tensor], num_experts: int) -> dict[str, Tensor]:
    """Offsets of lambda from 1.5 and of theta from N/2; loads start empty, because the authors' code saves none."""
    rate = layer["gate.lamb"].reshape(()) - 1.5 if "gate.lamb" in layer else torch.zeros(())
    scale = layer["gate.theta"].reshape(()) - num_experts / 2 if "gate.theta" in layer else torch.zeros(())
    return {
        "graphlora_coordination.poisson_rate_bias": rate,
        "graphlora_coordination.normal_scale_bias": scale,
        "graphlora_coordination.cumulative_weights": torch.zeros(num_experts),
    }
