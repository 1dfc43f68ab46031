"""The recipe of a training run: one flat record that the command line, a YAML file and Python share.

Names are `transformers.TrainingArguments`' for training and `GraphLoraConfig`'s for the adapter, so that what
a user knows from there holds here. Imports no torch: a recipe is read, checked and shown in milliseconds.
"""

# ruff: noqa: RUF009 - `option` only builds a `dataclasses.field`.

from __future__ import annotations

import math
from dataclasses import MISSING, asdict, dataclass, field, fields, replace
from functools import cache
from pathlib import Path
from typing import Any, Literal, get_type_hints

import yaml

from graphlora import untrusted
from graphlora.errors import GraphLoraError
from graphlora.training.suggestion import suggestion
from graphlora.typed import Mismatch, fitted, type_name

GROUPS = {
    "model": "Model and method",
    "adapter": "Adapter (left out: the preset's value)",
    "data": "Data",
    "training": "Training",
    "evaluation": "Validation and checkpoints",
    "output": "Output",
}


# Values of `step_mode` that record steps as CUDA graphs.
RECORDED = ("graph", "compiled_graph")


def option(group: str, text: str, default: Any = MISSING, factory: Any = MISSING) -> Any:
    """A recipe field that carries its help text and the group it is listed under."""
    return field(default=default, default_factory=factory, metadata={"group": group, "help": text})


@dataclass(frozen=True)
class Recipe:
    """Everything that decides a training run. `None` means "the preset's, model's or device's own value"."""

    model: str = option("model", "base model: a directory, a hub id, or a directory with one .gguf file")
    task: str | dict[str, float] = option(
        "data",
        "task name, data file (.jsonl, .json, .csv, .parquet), hub:owner/name (streaming: also a folder of "
        "files or a pattern such as 'data/*.jsonl'), or a mixture "
        '\'{"arc_easy": 2, "boolq": 1}\' with weights',
    )
    output_dir: str = option("output", "directory for the adapter, its record and the checkpoints")

    method: Literal["graphlora", "lora"] = option("model", "graphlora, or plain LoRA to compare", "graphlora")
    dtype: Literal["auto", "float32", "bfloat16", "float16"] = option(
        "model", "dtype of the frozen base; adapters are float32; auto: bfloat16 where it is fast", "auto"
    )
    attn_implementation: str | None = option("model", "attention of transformers: sdpa, eager, ...", None)
    load_in_4bit: bool = option(
        "model", "keep the frozen base in 4 bits (NF4, bitsandbytes): a quarter of the memory, slower", False
    )

    preset: str | None = option(
        "adapter", "preset: graphlora, paper, released, or another method's name", None
    )
    num_experts: int | None = option("adapter", "experts per FFN block", None)
    top_k: int | None = option("adapter", "experts that each token uses", None)
    r: int | None = option("adapter", "LoRA rank", None)
    lora_alpha: int | float | None = option("adapter", "LoRA alpha; the scaling is lora_alpha / r", None)
    lora_dropout: float | None = option("adapter", "LoRA dropout", None)
    target_modules: str | list[str] | None = option(
        "adapter", "names or a regular expression of FFN blocks (lora: of linear layers)", None
    )
    attention_target_modules: str | list[str] | None = option(
        "adapter", "attention projections with plain LoRA", None
    )
    exclude_modules: str | list[str] | None = option("adapter", "modules to leave alone", None)
    layers_to_transform: list[int] | int | None = option("adapter", "layers to adapt", None)
    expert_granularity: str | None = option("adapter", "ffn or linear", None)
    router_type: str | None = option("adapter", "graph or linear", None)
    router_conv: str | None = option("adapter", "gcn, sage or gat", None)
    router_num_layers: int | None = option("adapter", "graph layers of the router", None)
    router_hidden_size: int | None = option("adapter", "width of the router", None)
    edge_init: str | None = option("adapter", "random, similarity, ring, complete, none or learned", None)
    edge_density: float | None = option("adapter", "share of expert pairs that are joined", None)
    edges: list[list[int]] | None = option(
        "adapter", "explicit edges between experts: [[0, 1], [2, 3]]", None
    )
    graph_seed: int | None = option("adapter", "seed of the random graph", None)
    shared_graph: bool | None = option("adapter", "one graph for all blocks", None)
    router_poisson_loss_coef: float | None = option("adapter", "weight of the Poisson distinction loss", None)
    router_normal_loss_coef: float | None = option("adapter", "weight of the normal balance loss", None)
    load_window: str | None = option("adapter", "cumulative, ema or batch", None)
    modules_to_save: list[str] | None = option("adapter", "modules trained in full", None)
    use_dora: bool | None = option(
        "adapter", "method lora: DoRA, weights split in magnitude and direction", None
    )
    use_rslora: bool | None = option("adapter", "method lora: rsLoRA, scaled by lora_alpha / sqrt(r)", None)
    backend: str | None = option("adapter", "auto, eager, torch or triton", None)
    recompute_gate_up: bool | None = option(
        "adapter", "compute the gate and up projections again in backward: less memory, more time", None
    )
    adapter_args: dict[str, Any] = option("adapter", "any other field of the adapter's config", factory=dict)

    data_dir: str | None = option("data", "folder with the tasks' files in the hub's schemas", None)
    scoring: Literal["cloze", "letter"] = option(
        "data", "multiple choice is answered by the choice's text (cloze) or its letter", "cloze"
    )
    train_on: Literal["completion", "all"] = option(
        "data", "loss on the answer only, or on all", "completion"
    )
    append_eos: bool = option("data", "end each answer with the end-of-text token, so that it stops", True)
    max_length: int | None = option("data", "longest sequence in tokens; left out: the model's window", None)
    truncation: Literal["refuse", "prompt", "end", "drop"] = option(
        "data",
        "rows longer than max_length: refuse; cut the prompt's start; cut the end; drop the row",
        "refuse",
    )
    packing: bool = option("data", "join the rows of a batch in one sequence instead of padding", False)
    streaming: bool | None = option(
        "data",
        "read and tokenize rows while training, in memory that does not grow with the data; left out: for local "
        "data above 1 GB",
        None,
    )
    shuffle_buffer_size: int = option(
        "data", "streaming: rows that are shuffled together; 1 keeps the order of the files", 10_000
    )
    train_limit: int | None = option("data", "train on this many rows, chosen by the seed", None)
    limit_seed: int | None = option(
        "data", "seed that chooses the rows of train_limit and eval_limit; left out: seed", None
    )

    learning_rate: float = option("training", "peak learning rate", 2e-4)
    num_train_epochs: float = option("training", "passes over the data", 3.0)
    max_steps: int = option("training", "optimizer steps; overrides num_train_epochs when positive", -1)
    per_device_train_batch_size: int = option("training", "rows per device and forward pass", 16)
    gradient_accumulation_steps: int = option("training", "forward passes per optimizer step", 1)
    lr_scheduler_type: str = option(
        "training", "linear, cosine, constant, constant_with_warmup, ...", "linear"
    )
    warmup_ratio: float = option("training", "share of the steps that warm up", 0.03)
    warmup_steps: int = option("training", "warm-up steps; overrides warmup_ratio when positive", 0)
    weight_decay: float = option("training", "weight decay (none on biases, norms, lambda and sigma)", 0.01)
    max_grad_norm: float = option("training", "gradient clipping; 0 for none", 1.0)
    optim: str = option(
        "training", "optimizer, by transformers' name; auto: adamw_torch, the fused one on a GPU", "auto"
    )
    loraplus_lr_ratio: float | None = option("training", "LoRA+: learning rate of B over that of A", None)
    bf16: bool | None = option("training", "bfloat16 autocast; left out: on a GPU with a bfloat16 base", None)
    fp16: bool = option("training", "float16 autocast with loss scaling", False)
    gradient_checkpointing: bool = option("training", "recompute activations to save memory", False)
    step_mode: Literal["auto", "eager", "compile", "graph", "compiled_graph"] = option(
        "training",
        "how a step runs: eager, kernel by kernel; compile, decoder layers and loss by torch.compile, which takes "
        "seconds per shape of a batch and makes steps a fifth faster; graph, recorded once per shape as a CUDA graph, "
        "for small models and short rows; compiled_graph, both; auto: on an NVIDIA GPU graph for small models, and "
        "compiled where the run is long enough for it to pay",
        "auto",
    )
    loss_kernel: Literal["auto", "liger", "none"] = option(
        "training",
        "liger: a loss that never holds all logits, from the package liger-kernel (GPU); none: logits at the "
        "answers' positions; auto: none",
        "auto",
    )
    train_sampling_strategy: Literal["random", "group_by_length", "sequential"] = option(
        "training", "order of the rows; shuffled anew each epoch from the seed", "random"
    )
    on_nonfinite: Literal["stop", "skip"] = option(
        "training", "a step whose loss or gradient is not finite: stop the run, or leave the step out", "stop"
    )
    max_skipped_steps: int = option("training", "steps that on_nonfinite skip may leave out", 10)
    seed: int = option("training", "seed of weights, data order and dropout", 0)
    deterministic: bool = option(
        "training",
        "the same seed gives the same bits on a GPU too; operations without such a form are refused",
        False,
    )
    training_args: dict[str, Any] = option(
        "training", "any other field of transformers.TrainingArguments", factory=dict
    )

    eval_strategy: Literal["no", "steps", "epoch"] = option("evaluation", "when to validate", "steps")
    eval_steps: float = option("evaluation", "steps between validations; below 1: share of all steps", 0.2)
    save_steps: float | None = option(
        "evaluation",
        "steps between checkpoints, a multiple of eval_steps; one that validates best is saved in any case; "
        "left out: eval_steps",
        None,
    )
    save_total_limit: int | None = option("evaluation", "checkpoints to keep besides the best", 2)
    per_device_eval_batch_size: int = option("evaluation", "rows per device when measuring the loss", 16)
    eval_limit: int | None = option(
        "evaluation", "validate on this many rows; left out: the whole split", None
    )
    load_best_model_at_end: bool = option("evaluation", "keep the checkpoint that validates best", True)
    metric_for_best_model: str | None = option(
        "evaluation",
        "acc_norm (cloze), acc, loss, or of one task of a mixture TASK_acc; left out: acc_norm (cloze), acc (letter), "
        "or loss for free text",
        None,
    )
    early_stopping_patience: int | None = option(
        "evaluation", "stop after this many validations without a gain", None
    )
    early_stopping_threshold: float = option("evaluation", "smallest gain that counts", 0.0)

    logging_steps: float = option("output", "steps between log lines; below 1: share of all steps", 10)
    report_to: str | list[str] = option("output", "none, tensorboard, wandb, trackio, ...", "none")
    run_name: str | None = option("output", "name of the run in the trackers", None)

    def __post_init__(self) -> None:
        """Raise `GraphLoraError` for a value out of its range or options that exclude each other."""
        _check_ranges(self)
        _check_combinations(self)

    @classmethod
    def from_dict(cls, values: dict[str, Any]) -> Recipe:
        """Recipe from plain values (YAML, JSON); strings such as `1e-4` become numbers.

        Raises:
            GraphLoraError: Unknown or missing name, wrong type, or value out of range.
        """
        known = {item.name for item in fields(cls)}
        for name in values:
            if name not in known:
                raise GraphLoraError(f"unknown recipe option {name!r}{suggestion(str(name), known)}")
        required = [item.name for item in fields(cls) if _default(item) is MISSING]
        missing = [name for name in required if values.get(name) is None]
        if missing:
            raise GraphLoraError(
                f"the recipe has no {', '.join(missing)}; give --{missing[0]} or name it in it"
            )
        return cls(**_typed(values))

    @classmethod
    def from_yaml(cls, path: str | Path) -> Recipe:
        """Recipe from a YAML file; see `from_dict`."""
        return cls.from_dict(read_yaml(path))

    def to_yaml(self) -> str:
        """All options as YAML, in the order of the fields; `Recipe.from_yaml` reads it back."""
        return yaml.safe_dump(asdict(self), sort_keys=False, allow_unicode=True)

    def changed(self, **values: Any) -> Recipe:
        """Copy with some options replaced, checked again."""
        return replace(self, **values)

    def adapter_options(self) -> dict[str, Any]:
        """The adapter's options that were given, for `GraphLoraConfig` or `peft.LoraConfig`."""
        names = [item.name for item in fields(self) if item.metadata["group"] == "adapter"]
        given = {name: getattr(self, name) for name in names if name != "adapter_args"}
        return {name: value for name, value in given.items() if value is not None} | self.adapter_args


def read_yaml(path: str | Path) -> dict[str, Any]:
    """Mapping in a YAML file.

    Raises:
        GraphLoraError: The file is missing, broken (names the line) or not a mapping.
    """
    node, where = untrusted.read_yaml(Path(path), "the recipe")
    values = untrusted.yaml_value(node, where)
    if not isinstance(values, dict):
        raise GraphLoraError(f"{path} holds no recipe: expected lines such as 'model: PATH'")
    return values


@cache
def option_types() -> dict[str, Any]:
    """Type of each recipe option."""
    return get_type_hints(Recipe)


def _default(item: Any) -> Any:
    return item.default if item.default is not MISSING else item.default_factory


def _typed(values: dict[str, Any]) -> dict[str, Any]:
    types = option_types()
    typed = {}
    for name, value in values.items():
        try:
            typed[name] = fitted(value, types[name])
        except Mismatch:
            raise GraphLoraError(f"{name} is {value!r}; expected {type_name(types[name])}") from None
    return typed


POSITIVE = (
    "learning_rate",
    "num_train_epochs",
    "per_device_train_batch_size",
    "gradient_accumulation_steps",
    "per_device_eval_batch_size",
    "eval_steps",
    "save_steps",
    "save_total_limit",
    "logging_steps",
    "loraplus_lr_ratio",
    "early_stopping_patience",
    "max_length",
    "max_skipped_steps",
    "train_limit",
    "eval_limit",
    "shuffle_buffer_size",
    "r",
    "num_experts",
    "top_k",
)
NOT_NEGATIVE = ("weight_decay", "max_grad_norm", "warmup_ratio", "warmup_steps", "early_stopping_threshold")


def _check_ranges(recipe: Recipe) -> None:
    for name in POSITIVE:
        value = getattr(recipe, name)
        if value is not None and not 0 < value < math.inf:
            raise GraphLoraError(f"{name} is {value}; give a number above 0")
    for name in NOT_NEGATIVE:
        value = getattr(recipe, name)
        if not 0 <= value < math.inf:
            raise GraphLoraError(f"{name} is {value}; give 0 or more")
    if recipe.warmup_ratio >= 1:
        raise GraphLoraError(
            f"warmup_ratio is {recipe.warmup_ratio}; give a share below 1, or use warmup_steps"
        )
    if isinstance(recipe.task, dict) and (not recipe.task or min(recipe.task.values()) <= 0):
        raise GraphLoraError(f"task is {recipe.task}; give each task of a mixture a weight above 0")


def _check_streaming(recipe: Recipe) -> None:
    """Options that need all rows at once."""
    refused = {
        "train_limit": (recipe.train_limit, None, "use max_steps"),
        "eval_strategy": (recipe.eval_strategy == "epoch" and "epoch", False, "use steps"),
        "train_sampling_strategy": (
            recipe.train_sampling_strategy == "group_by_length" and "group_by_length",
            False,
            "use random, or packing",
        ),
    }
    for name, (value, allowed, remedy) in refused.items():
        if value != allowed:
            raise GraphLoraError(
                f"{name} is {value}, which needs all rows at once; {remedy}, or set streaming to false"
            )


def _check_combinations(recipe: Recipe) -> None:
    if recipe.streaming:
        _check_streaming(recipe)
    if recipe.step_mode in RECORDED and recipe.loss_kernel == "liger":
        raise GraphLoraError(
            f"step_mode {recipe.step_mode} cannot record the loss_kernel liger, which counts labels on the host; "
            "choose one"
        )
    if recipe.bf16 and recipe.fp16:
        raise GraphLoraError("bf16 and fp16 are both on; choose one")
    if recipe.early_stopping_patience is not None and recipe.eval_strategy == "no":
        raise GraphLoraError("early_stopping_patience needs validation; set eval_strategy to steps or epoch")
    if recipe.save_steps is not None and recipe.eval_strategy == "steps" and recipe.load_best_model_at_end:
        saves, evals = recipe.save_steps, recipe.eval_steps
        if (saves < 1) != (evals < 1):
            kinds = ("a share of all steps", "a number of steps")
            raise GraphLoraError(
                f"save_steps is {saves:g}, {kinds[saves >= 1]}, and eval_steps is {evals:g}, {kinds[evals >= 1]}; "
                f"the best checkpoint is kept, so each must be validated: set eval_steps to {saves:g} too, or "
                "load_best_model_at_end to false"
            )
        parts = min(saves / evals, 1e15)
        if abs(parts - round(parts)) > 1e-9:
            raise GraphLoraError(
                f"save_steps is {saves:g}, not a multiple of eval_steps ({evals:g}); "
                "make it one, or set load_best_model_at_end to false"
            )
