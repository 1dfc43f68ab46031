"""Which code computes the loss: transformers' own, or Liger's, which never holds the logits of all positions."""

from __future__ import annotations

import inspect
from importlib.util import find_spec

import torch

from graphlora.errors import GraphLoraError
from graphlora.training.recipe import Recipe
from graphlora.training.step_mode import StepMode

# The fused loss was compared in an interpreter alone: until it has run beside the adapter on a GPU, `auto` leaves it.
AUTO_TAKES_LIGER = False
FUSED_LOSS = "fused_linear_cross_entropy"


def liger_options(
    recipe: Recipe, model_type: str, device: torch.device, step_mode: StepMode
) -> dict[str, bool] | None:
    """Options for `TrainingArguments.liger_kernel_config`: the fused loss on, all other kernels off.

    Args:
        recipe: The run.
        model_type: `model_type` of the model's configuration.
        device: Where it runs.
        step_mode: How steps run; Liger counts labels on the host, so only eager steps can have it.

    Returns:
        `None` where transformers computes the loss.

    Raises:
        GraphLoraError: The recipe wants Liger where it cannot be.
    """
    if recipe.loss_kernel == "none" or (recipe.loss_kernel == "auto" and not AUTO_TAKES_LIGER):
        return None
    reason = _why_not(device, step_mode)
    options = None if reason is not None else fused_loss_options(model_type)
    if reason is None and options is None:
        reason = f"Liger has no loss for models of type {model_type}"
    if reason is not None and recipe.loss_kernel == "liger":
        raise GraphLoraError(f"loss_kernel is liger, but {reason}; or set loss_kernel to none")
    return options


def _why_not(device: torch.device, step_mode: StepMode) -> str | None:
    # Last what an installation mends, which helps only where the rest is in order.
    if device.type != "cuda":
        return f"its kernels need a GPU, not {device.type}: train on one"
    if step_mode != "eager":
        return f"it cannot be part of a step of mode {step_mode}: set step_mode to eager"
    if find_spec("liger_kernel") is None:
        return "the package is not installed: pip install liger-kernel"
    return None


def fused_loss_options(model_type: str) -> dict[str, bool] | None:
    """Liger's switches for models of the type, all but the loss off; `None` where it has no loss for them.

    Raises:
        ImportError: Liger is not installed.
    """
    from liger_kernel.transformers.monkey_patch import (  # pyright: ignore[reportMissingImports]  # an extra
        MODEL_TYPE_TO_APPLY_LIGER_FN,
    )

    patch = MODEL_TYPE_TO_APPLY_LIGER_FN.get(model_type)
    parameters = {} if patch is None else inspect.signature(patch).parameters
    if FUSED_LOSS not in parameters:
        return None
    switches = {name: False for name, item in parameters.items() if isinstance(item.default, bool)}
    return switches | {FUSED_LOSS: True}
