"""How training steps run: kernel by kernel, compiled, or recorded as CUDA graphs."""

from __future__ import annotations

import os
from typing import Any, Literal

import torch
from transformers import PreTrainedModel

from graphlora.errors import GraphLoraError
from graphlora.training.recipe import Recipe

StepMode = Literal["eager", "compile", "graph"]

# Work of a forward and backward, in parameters times tokens, up to which launches rather than arithmetic take the time.
# On an H200 a recorded step takes 60 ms instead of 157 at 3.5e12, 104 instead of 163 at 7e12, and as long at 14e12.
GRAPH_MAX_WORK = 8e12
# A recorded step holds its activations for good, so a large model keeps the eager step's freedom.
GRAPH_MAX_PARAMETERS = 4e9
RECORDABLE_ATTENTION = ("sdpa", "eager")


def choose_step_mode(num_parameters: int, tokens_per_batch: int, device: torch.device) -> StepMode:
    """The mode that `auto` takes.

    Args:
        num_parameters: Parameters of the model.
        tokens_per_batch: Most tokens of one forward, padding included.
        device: Where it runs.
    """
    if device.type != "cuda" or num_parameters > GRAPH_MAX_PARAMETERS:
        return "eager"
    return "graph" if num_parameters * tokens_per_batch <= GRAPH_MAX_WORK else "eager"


def resolve_step_mode(recipe: Recipe, model: PreTrainedModel, device: torch.device, longest: int) -> StepMode:
    """The mode of a run.

    Args:
        recipe: The run.
        model: The base model.
        device: Where it runs.
        longest: Tokens of the longest row.

    Raises:
        GraphLoraError: The recipe wants steps recorded that cannot be.
    """
    reason = why_not_recorded(recipe, model, device)
    if recipe.step_mode == "graph" and reason is not None:
        raise GraphLoraError(f"step_mode is graph, but {reason}; set step_mode to auto or eager")
    if recipe.step_mode != "auto":
        return recipe.step_mode
    if reason is not None or recipe.loss_kernel == "liger" or getattr(model, "is_quantized", False):
        return "eager"
    return choose_step_mode(model.num_parameters(), recipe.per_device_train_batch_size * longest, device)


def why_not_recorded(recipe: Recipe, model: PreTrainedModel, device: torch.device) -> str | None:
    """What keeps the steps of a run from being recorded; `None` where nothing does."""
    config: Any = model.config.get_text_config()
    attention = config._attn_implementation
    sliding = {"sliding_attention", "chunked_attention"} & set(getattr(config, "layer_types", None) or ())
    reasons = {
        f"CUDA graphs need an NVIDIA GPU, not {device.type}": device.type != "cuda",
        "several processes train together": int(os.environ.get("WORLD_SIZE", "1")) > 1,
        "one process uses several GPUs (start one process for each)": torch.cuda.device_count() > 1,
        "the model is spread over several devices": len(set(getattr(model, "hf_device_map", {}).values()))
        > 1,
        "gradient_checkpointing restores random states on the host": recipe.gradient_checkpointing,
        "fp16 looks at each loss on the host (bf16 does not)": recipe.fp16,
        "the backend eager of the adapter waits for the device": recipe.backend == "eager",
        f"attn_implementation {attention} may wait for the device (sdpa does not)": attention
        not in RECORDABLE_ATTENTION,
        "packing with a model of sliding attention needs two masks": recipe.packing and bool(sliding),
    }
    return next((text for text, holds in reasons.items() if holds), None)


def allow_shapes(count: int) -> None:
    """Let `torch.compile` keep code for that many shapes of a batch, in training and in validation."""
    import torch._dynamo

    torch._dynamo.config.cache_size_limit = max(torch._dynamo.config.cache_size_limit, 2 * count)
