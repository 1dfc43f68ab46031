"""How a run was launched: one process or several, with or without a sharded base; what cannot work is refused."""

from __future__ import annotations

import os
from datetime import timedelta
from typing import Any

import torch

from graphlora.errors import GraphLoraError
from graphlora.training.recipe import Recipe

SHARDED_CONFIG = "fsdp2"
DEFAULT_TIMEOUT = 1800


def num_processes() -> int:
    """Processes that train together, as the launcher says."""
    return int(os.environ.get("WORLD_SIZE", "1"))


def is_first() -> bool:
    """Whether this process is the one that writes files and speaks."""
    return os.environ.get("RANK", "0") == "0"


def wants_sharding() -> bool:
    """Whether accelerate was told to shard the model (FSDP)."""
    return _is_set("ACCELERATE_USE_FSDP")


def uses_cpu(recipe: Recipe) -> bool:
    """Whether the run computes on the CPU: as the recipe says, or because there is nothing else.

    accelerate wants to be told: of several processes without an accelerator it makes as many runs, all of them writing
    the same files.
    """
    return bool(recipe.training_args.get("use_cpu", not torch.accelerator.is_available()))


def start_processes(recipe: Recipe) -> None:
    """Join the other processes, where there are any; must come before the model is loaded.

    Only then does transformers know which process reads the weights, and each process its own GPU.

    Raises:
        GraphLoraError: A way to train together, or an option with it, that cannot work.
    """
    check_launch(recipe)
    if num_processes() == 1:
        return
    from accelerate import PartialState

    given = recipe.training_args
    options: dict[str, Any] = {"backend": given.get("ddp_backend")}
    seconds = int(given.get("ddp_timeout", DEFAULT_TIMEOUT))
    PartialState(cpu=uses_cpu(recipe), timeout=timedelta(seconds=seconds), **options)
    if not is_first():
        from transformers.utils.logging import disable_progress_bar

        disable_progress_bar()


def check_launch(recipe: Recipe) -> None:
    """Refuse DeepSpeed, FSDP's first version, and options that a sharded base does not have.

    Raises:
        GraphLoraError: Says what to change.
    """
    if _is_set("ACCELERATE_USE_DEEPSPEED"):
        raise GraphLoraError(
            "DeepSpeed is not supported (its ZeRO-3 takes weights away while the adapter still uses them); launch with "
            f"FSDP2, which saves the same memory: {_launch_command()}"
        )
    if not wants_sharding():
        return
    if os.environ.get("FSDP_VERSION", "1") != "2":
        raise GraphLoraError(
            f"FSDP version {os.environ.get('FSDP_VERSION', '1')} is not supported; set fsdp_version: 2 in the config "
            f"of accelerate, or use the one that comes with graphlora: {_launch_command()}"
        )
    policy = os.environ.get("FSDP_AUTO_WRAP_POLICY", "NO_WRAP").upper()
    if policy == "NO_WRAP":
        raise GraphLoraError(
            "fsdp_auto_wrap_policy is NO_WRAP, which would gather the whole model at once; set it to "
            "TRANSFORMER_BASED_WRAP in the config of accelerate"
        )
    if _is_set("FSDP_ACTIVATION_CHECKPOINTING"):
        raise GraphLoraError(
            "fsdp_activation_checkpointing is on in the config of accelerate; turn it off there and set "
            "gradient_checkpointing to true in the recipe"
        )
    if recipe.step_mode not in ("auto", "eager"):
        raise GraphLoraError(
            f"step_mode is {recipe.step_mode}, which needs all weights in place, but FSDP gathers them layer by layer; "
            "set step_mode to eager"
        )


def check_sharded(is_sharded: bool, device: torch.device) -> None:
    """Raise `GraphLoraError` where sharding was asked for and accelerate does without it."""
    if wants_sharding() and num_processes() > 1 and not is_sharded:
        raise GraphLoraError(
            f"FSDP was asked for, but accelerate shards models on GPUs only, not on {device.type}; launch without it: "
            "accelerate launch --config_file ddp.yaml"
        )


def _launch_command() -> str:
    return (
        f'accelerate launch --config_file "$(graphlora accelerate {SHARDED_CONFIG})" -m graphlora train ...'
    )


def _is_set(name: str) -> bool:
    return os.environ.get(name, "false").lower() in ("true", "1", "yes")
