"""Put the recipe's adapter on a base model."""

from __future__ import annotations

import re
import warnings
from dataclasses import fields
from typing import Any

import torch
from peft import LoraConfig, PeftConfig, PeftModel, TaskType, get_peft_model
from transformers import PreTrainedModel

from graphlora.errors import GraphLoraError
from graphlora.ops.backend import resolve_backend
from graphlora.training.recipe import Recipe
from graphlora.training.suggestion import suggestion
from graphlora.tuner.config import GraphLoraConfig
from graphlora.tuner.layer import GraphLoraLayer
from graphlora.tuner.register import register

# Options that name modules.
MODULES = ("target_modules", "attention_target_modules", "exclude_modules")
# What a command line has for several names, or for one without numbers: as an expression it would match nothing, or
# a module of just that name.
_NAME = r"\w+(\.\w+)*"
_SEVERAL = re.compile(rf"{_NAME}(\s*[,\s]\s*{_NAME})+\s*,?|{_NAME}\s*,")
_ONE = re.compile(r"[^\W\d]\w*(\.[^\W\d]\w*)*")


def adapter_config(recipe: Recipe) -> PeftConfig:
    """PEFT config of the recipe's method with the options that it gives.

    Raises:
        GraphLoraError: An option that the method does not have, or a value that its config refuses.
    """
    register()
    kind: Any = GraphLoraConfig if recipe.method == "graphlora" else LoraConfig
    options = recipe.adapter_options()
    known = {item.name for item in fields(kind)}
    for name in options:
        if name not in known:
            raise GraphLoraError(f"{name} has no meaning for method {recipe.method}{suggestion(name, known)}")
    if recipe.method == "lora":
        options.setdefault("target_modules", "all-linear")
    options |= {name: _as_names(options[name]) for name in MODULES if name in options}
    try:
        return kind(task_type=TaskType.CAUSAL_LM, **options)
    except TypeError as error:
        raise GraphLoraError(f"the adapter's config refuses the recipe: {error}") from error


def add_adapter(model: PreTrainedModel, recipe: Recipe) -> PeftModel:
    """The model with a fresh adapter in float32; call `set_seed` before, the weights are random.

    Raises:
        GraphLoraError: See `adapter_config`; or the model has no module to adapt, or no layer of that number.
    """
    _check_layers(recipe, model)
    config = adapter_config(recipe)
    try:
        adapted = get_peft_model(model, config)
    except GraphLoraError:
        raise
    except ValueError as error:
        raise GraphLoraError(f"cannot adapt the model: {' '.join(str(error).split())}") from error
    assert isinstance(adapted, PeftModel)
    _warn_of_unknown_names(adapted)
    return adapted


def check_backend(model: PeftModel, device: torch.device) -> None:
    """Raise `GraphLoraError` where the adapter's backend cannot run on the device, which a step would find out late."""
    for module in model.modules():
        if isinstance(module, GraphLoraLayer):
            for name, config in module.configs.items():
                resolve_backend(config.backend, device.type, module.unsupported[name])


def _as_names(given: Any) -> Any:
    """Names of modules as a list: `q_proj` and `q_proj,v_proj` are no regular expressions."""
    if not isinstance(given, str) or not (_ONE.fullmatch(given) or _SEVERAL.fullmatch(given)):
        return given
    return re.split(r"[,\s]+", given.strip(" ,"))


def _warn_of_unknown_names(adapted: PeftModel) -> None:
    """PEFT passes over names that no module has, as long as another one is found.

    A warning, because a list may have the names of several architectures.
    """
    config = adapted.active_peft_config
    paths = [path for path, _ in adapted.get_base_model().named_modules() if path]
    known = {path.rpartition(".")[2] for path in paths if not path.rpartition(".")[2].isdigit()}
    for option in MODULES[:2]:
        # What PEFT makes of names of a mixture of experts is no longer among them.
        given = getattr(config, option, None)
        for name in [] if given is None or isinstance(given, str) else sorted(given):
            if not any(path == name or path.endswith(f".{name}") for path in paths):
                warnings.warn(
                    f"{option} names {name}, which the model does not have{suggestion(name, known)}",
                    stacklevel=3,
                )


def _check_layers(recipe: Recipe, model: PreTrainedModel) -> None:
    wanted = recipe.adapter_options().get("layers_to_transform")
    count = getattr(model.config.get_text_config(), "num_hidden_layers", None)
    for layer in [wanted] if isinstance(wanted, int) else wanted or []:
        if count is not None and not 0 <= layer < count:
            raise GraphLoraError(
                f"layers_to_transform names layer {layer}; the model's layers are numbered 0 to {count - 1}"
            )
