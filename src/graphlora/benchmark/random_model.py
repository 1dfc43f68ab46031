"""Causal language models with random weights, made where they will run."""

from __future__ import annotations

import copy
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import nn
from transformers import AutoModelForCausalLM, PretrainedConfig, PreTrainedModel

from graphlora.errors import GraphLoraError


def random_model(
    config: PretrainedConfig, device: torch.device, dtype: torch.dtype, seed: int = 0
) -> PreTrainedModel:
    """A model of this architecture, initialized on the device in its dtype: no copy on the CPU, no float32 copy.

    Args:
        config: architecture.
        device: where the weights are made.
        dtype: their type.
        seed: of the weights.

    Raises:
        GraphLoraError: an architecture without a causal language model in transformers.
    """
    torch.manual_seed(seed)
    try:
        with torch.device(device):
            model = AutoModelForCausalLM.from_config(config, dtype=dtype)
    except ValueError as error:
        raise GraphLoraError(
            f"no causal language model for {type(config).__name__}: {' '.join(str(error).split())[:200]}"
        ) from error
    model.requires_grad_(False)
    return model.train()


def twin(module: nn.Module) -> Any:
    """A second tree of modules over the same parameters and buffers, so that one base serves several adapters."""
    shared = {id(tensor): tensor for tensor in (*module.parameters(), *module.buffers())}
    return copy.deepcopy(module, memo=shared)


def wake(model: nn.Module, seed: int = 0, scale: float = 0.02) -> None:
    """Fills every B, which starts at zero, with numbers that bfloat16 holds exactly."""
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if "lora_B" in name:
                generator = torch.Generator(parameter.device).manual_seed(seed)
                noise = torch.empty_like(parameter).normal_(std=scale, generator=generator)
                parameter.copy_(noise.bfloat16())


def with_layers(config: PretrainedConfig, num_layers: int) -> PretrainedConfig:
    """The same architecture with another number of layers.

    Raises:
        GraphLoraError: a config that does not say its number of layers.
    """
    changed = copy.deepcopy(config)
    text = changed.get_text_config()
    if getattr(text, "num_hidden_layers", None) is None:
        raise GraphLoraError(f"{type(config).__name__} does not say num_hidden_layers")
    text.num_hidden_layers = num_layers
    kinds = getattr(text, "layer_types", None)
    if kinds:
        text.layer_types = [kinds[i % len(kinds)] for i in range(num_layers)]
    return changed


@contextmanager
def bypassed(layers: nn.ModuleList) -> Iterator[None]:
    """Within it the layers pass their input on, so that what is left is embedding, head and loss."""
    originals = {layer: layer.__dict__.get("forward") for layer in layers}

    def identity(hidden_states: torch.Tensor, *args: Any, **kwargs: Any) -> torch.Tensor:
        del args, kwargs
        return hidden_states

    for layer in layers:
        layer.__dict__["forward"] = identity
    try:
        yield
    finally:
        for layer, original in originals.items():
            if original is None:
                del layer.__dict__["forward"]
            else:
                layer.__dict__["forward"] = original
