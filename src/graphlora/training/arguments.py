"""From a recipe to `transformers.TrainingArguments`."""

from __future__ import annotations

from dataclasses import fields
from typing import Any

import torch
from transformers import TrainingArguments, get_scheduler

from graphlora.errors import GraphLoraError
from graphlora.training.processes import uses_cpu
from graphlora.training.recipe import Recipe
from graphlora.training.suggestion import suggestion

SAME_NAME = (
    "output_dir",
    "learning_rate",
    "num_train_epochs",
    "max_steps",
    "per_device_train_batch_size",
    "per_device_eval_batch_size",
    "gradient_accumulation_steps",
    "lr_scheduler_type",
    "weight_decay",
    "max_grad_norm",
    "fp16",
    "train_sampling_strategy",
    "seed",
    "eval_strategy",
    "eval_steps",
    "metric_for_best_model",
    "logging_steps",
    "report_to",
    "run_name",
)
REFUSED = {
    "full_determinism": "use --deterministic, which costs less",
    "label_smoothing_factor": "it would replace the model's loss and drop the router's losses",
    "push_to_hub": "push the finished adapter with PeftModel.push_to_hub",
    "resume_from_checkpoint": "use --resume",
    "logging_nan_inf_filter": "a loss that is not finite always stops the run",
    "load_best_model_at_end": "it is an option of its own",
    "remove_unused_columns": "rows have no unused columns",
    "save_strategy": "it follows eval_strategy",
    "save_only_model": "a run could not be resumed",
    "fsdp": "launch with accelerate and its config instead, see docs/distributed.md",
    "fsdp_config": "launch with accelerate and its config instead, see docs/distributed.md",
    "deepspeed": "shard the base with FSDP2 instead, see docs/distributed.md",
    "torch_compile": "use --step_mode compile",
    "use_liger_kernel": "use --loss_kernel liger",
}
# Arguments of the compiler, by transformers' names and by those of `torch.compile`.
COMPILER = {"torch_compile_backend": "backend", "torch_compile_mode": "mode"}


def training_arguments(
    recipe: Recipe, base_dtype: torch.dtype, *, liger: dict[str, bool] | None = None
) -> TrainingArguments:
    """Arguments of the `Trainer`.

    Args:
        recipe: The run; `metric_for_best_model` is resolved.
        base_dtype: Dtype of the frozen base, which decides `bf16` where the recipe leaves it open.
        liger: Kernels of Liger to use.

    Raises:
        GraphLoraError: An unknown or refused name in `training_args`, or a value that transformers refuses.
    """
    validates = recipe.eval_strategy != "no"
    values: dict[str, Any] = {name: getattr(recipe, name) for name in SAME_NAME}
    values |= _checkpointing(recipe.gradient_checkpointing)
    values |= {
        "warmup_steps": recipe.warmup_steps or recipe.warmup_ratio,
        "bf16": _autocasts(recipe, base_dtype),
        "optim": _optimizer(recipe),
        "use_liger_kernel": liger is not None,
        "liger_kernel_config": liger,
        "save_strategy": "epoch" if recipe.eval_strategy == "epoch" else "steps",
        "save_steps": recipe.save_steps if recipe.save_steps is not None else recipe.eval_steps,
        "save_total_limit": None,
        "load_best_model_at_end": validates and recipe.load_best_model_at_end,
        "use_cpu": uses_cpu(recipe),
        "logging_nan_inf_filter": False,
        "logging_first_step": True,
        "prediction_loss_only": True,
        "remove_unused_columns": False,
        "dataloader_pin_memory": torch.accelerator.is_available(),
        "restore_callback_states_from_checkpoint": True,
    }
    if recipe.fp16 and not _on_accelerator(recipe):
        raise GraphLoraError("fp16 has no effect on a CPU; set it to false, or train on a GPU")
    if not validates:
        values["metric_for_best_model"] = None
    values |= _checked(recipe)
    if values["dataloader_pin_memory"]:
        # Otherwise the host waits, with each batch, for all that the device still has to do.
        given = values.get("accelerator_config") or {}
        values["accelerator_config"] = {"non_blocking": True} | given if isinstance(given, dict) else given
    try:
        arguments = TrainingArguments(**values)
        _try_schedule(arguments)
    except (ValueError, TypeError, ImportError, RuntimeError, OSError) as error:
        raise GraphLoraError(f"transformers refuses the recipe: {' '.join(str(error).split())}") from error
    if getattr(arguments.accelerator_config, "dispatch_batches", False):
        # One process would make all batches and cut what it joins of them; they need not have the same tensors.
        raise GraphLoraError(
            "training_args.accelerator_config.dispatch_batches is not supported: each process makes its own batches; "
            "leave it out"
        )
    return arguments


def _try_schedule(arguments: TrainingArguments) -> None:
    """Makes the learning-rate schedule once: `Trainer` does so when everything is loaded, and then it is late."""
    optimizer = torch.optim.SGD([torch.zeros(1, requires_grad=True)], lr=1.0)
    options: Any = arguments.lr_scheduler_kwargs
    get_scheduler(
        arguments.lr_scheduler_type, optimizer, 1, 2, options if isinstance(options, dict) else None
    )


def _optimizer(recipe: Recipe) -> str:
    """On a GPU the fused AdamW, which takes two kernel launches where the other one takes hundreds."""
    if recipe.optim != "auto":
        return recipe.optim
    on_gpu = torch.cuda.is_available() and not uses_cpu(recipe)
    return "adamw_torch_fused" if on_gpu else "adamw_torch"


def _on_accelerator(recipe: Recipe) -> bool:
    return torch.accelerator.is_available() and not uses_cpu(recipe)


def _autocasts(recipe: Recipe, base_dtype: torch.dtype) -> bool:
    if recipe.bf16 is not None:
        return recipe.bf16
    return base_dtype == torch.bfloat16 and torch.cuda.is_available() and not recipe.fp16


def _checkpointing(on: bool) -> dict[str, Any]:
    """Non-reentrant activation checkpointing, under the name that this transformers uses."""
    known = {item.name for item in fields(TrainingArguments)}
    name = "activation_checkpointing" if "activation_checkpointing" in known else "gradient_checkpointing"
    return {name: True, f"{name}_kwargs": {"use_reentrant": False}} if on else {}


def _checked(recipe: Recipe) -> dict[str, Any]:
    known = {item.name for item in fields(TrainingArguments)}
    own = {item.name for item in fields(Recipe)}
    for name, value in recipe.training_args.items():
        if name in REFUSED and value:
            raise GraphLoraError(f"training_args.{name} is not supported: {REFUSED[name]}")
        if name in own:
            raise GraphLoraError(f"training_args.{name}: {name} is an option of its own; give --{name}")
        if name not in known:
            raise GraphLoraError(f"training_args.{name} is unknown to transformers{suggestion(name, known)}")
        if name in COMPILER and recipe.step_mode in ("eager", "graph"):
            raise GraphLoraError(
                f"training_args.{name} is {value}, but step_mode {recipe.step_mode} compiles nothing; set step_mode to "
                "compile"
            )
    return {name: value for name, value in recipe.training_args.items() if name not in COMPILER}


def compiler_options(recipe: Recipe) -> dict[str, Any]:
    """What the recipe asks of `torch.compile`, by its own names.

    Raises:
        GraphLoraError: It knows no such backend or mode.
    """
    given = recipe.training_args
    options = {own: given[name] for name, own in COMPILER.items() if given.get(name) is not None}
    try:
        torch.compile(lambda x: x, **options)
    except RuntimeError as error:
        names = ", ".join(f"{name} {given[name]}" for name in COMPILER if name in given)
        reason = " ".join(str(error).split())
        raise GraphLoraError(f"torch.compile refuses training_args.{names}: {reason}") from error
    return options


def checkpoint_bytes(num_trained: int, optimizer_state: int = 2) -> int:
    """Size of one checkpoint in bytes: float32 weights and their optimizer state."""
    return 4 * num_trained * (1 + optimizer_state)


def needed_bytes(recipe: Recipe, num_trained: int) -> int:
    """Room that a run takes: the checkpoints it keeps, the one being written, the best one, the adapter."""
    kept = (recipe.save_total_limit or 1) + 2
    return kept * checkpoint_bytes(num_trained) + 4 * num_trained
