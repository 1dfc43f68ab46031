"""The recorded numbers, and how far from them float32 rounding may lead."""

import json
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from safetensors import safe_open
from torch import nn

from graphlora.tuner.config import GraphLoraConfig

DATA = Path(__file__).parent / "data"
# Absolute, except losses (relative) and gradients (relative to the tensor's largest entry).
TOLERANCE = SimpleNamespace(logits=1e-5, probs=2e-6, counts=2e-5, losses=1e-5, gradients=5e-5)


class Recorded(dict):
    """Tensors of one file by name; `settings` is its metadata, as numbers where they are numbers."""

    settings: SimpleNamespace


def read(path: Path) -> Recorded:
    with safe_open(path, "pt") as file:
        recorded = Recorded({name: file.get_tensor(name) for name in file.keys()})  # noqa: SIM118
        recorded.settings = SimpleNamespace(**{k: _value(v) for k, v in (file.metadata() or {}).items()})
    return recorded


def _value(text: str):
    try:
        return json.loads(text)
    except json.JSONDecodeError:
        return text


def assert_within(ours: torch.Tensor, recorded: torch.Tensor, tolerance: float) -> None:
    torch.testing.assert_close(ours.detach().reshape(recorded.shape), recorded, rtol=0, atol=tolerance)


def assert_gradient(ours: torch.Tensor | None, recorded: torch.Tensor) -> None:
    assert ours is not None
    assert_within(ours, recorded, TOLERANCE.gradients * float(recorded.abs().max()))


def released_config(**fields) -> GraphLoraConfig:
    return GraphLoraConfig(preset="released", **fields)


def set_router(router: nn.Module, recorded: Recorded, prefix: str) -> dict[str, torch.Tensor]:
    """Gives a released router the recorded weights and graph; returns its parameters by recorded name."""
    num_layers = recorded.settings.router_num_layers
    convs = [f"convs.{i}.lin.weight" for i in range(num_layers)]
    router.expert_features.copy_(recorded[f"{prefix}X"])
    router.expert_features.requires_grad_()
    with torch.no_grad():
        router.token_proj.copy_(recorded[f"{prefix}mlp.weight"])
        router.expert_proj.copy_(recorded[f"{prefix}mlp_struct.weight"])
        router.conv_weight.copy_(torch.stack([recorded[f"{prefix}{name}"] for name in convs]))
        router.out_proj.copy_(recorded[f"{prefix}proj.weight"][0])
        router.adjacency.copy_(recorded["adjacency"][:-1, :-1].fill_diagonal_(0))
    return {
        "X": router.expert_features,
        "mlp.weight": router.token_proj,
        "mlp_struct.weight": router.expert_proj,
        "proj.weight": router.out_proj,
    }


def assert_router_gradients(
    router: nn.Module, named: dict[str, torch.Tensor], recorded: Recorded, prefix: str
):
    assert router.conv_weight.grad is not None
    for name, parameter in named.items():
        assert_gradient(parameter.grad, recorded[f"{prefix}{name}"])
    for i, grad in enumerate(router.conv_weight.grad):
        assert_gradient(grad, recorded[f"{prefix}convs.{i}.lin.weight"])


@pytest.fixture(scope="session")
def parity() -> SimpleNamespace:
    """The functions above, for test files, which cannot import one another."""
    return SimpleNamespace(
        data=DATA,
        tolerance=TOLERANCE,
        read=lambda name: read(DATA / name),
        released_config=released_config,
        set_router=set_router,
        within=assert_within,
        gradient=assert_gradient,
        router_gradients=assert_router_gradients,
    )


@pytest.fixture(params=["eager", "torch"])
def backend(request: pytest.FixtureRequest) -> str:
    return request.param
