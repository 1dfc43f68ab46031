"""How training steps run: kernel by kernel, compiled, recorded as CUDA graphs, or both."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any, Literal

import torch
from transformers import PreTrainedModel

from graphlora.errors import GraphLoraError
from graphlora.training.bucketing import bucket_length
from graphlora.training.data import Encoded
from graphlora.training.processes import num_processes
from graphlora.training.recipe import RECORDED, Recipe
from graphlora.training.streaming import TokenStream

StepMode = Literal["eager", "compile", "graph", "compiled_graph"]
COMPILED: tuple[StepMode, ...] = ("compile", "compiled_graph")

# Work of a forward and backward, in parameters times tokens, up to which launches rather than arithmetic take the time.
# On an H200 a recorded step takes 60 ms instead of 157 at 3.5e12, 104 instead of 163 at 7e12, and as long at 14e12.
# What is compiled computes faster but takes as many launches: 73 instead of 161 ms at 7e12, 141 and 161 at 14e12.
GRAPH_MAX_WORK, GRAPH_MAX_COMPILED_WORK = 8e12, 16e12
# A recorded step holds its activations for good, so a large model keeps the eager step's freedom.
GRAPH_MAX_PARAMETERS = 4e9
MASKED_ATTENTION = ("sdpa", "eager")
# What compiling spares a forward and backward, in seconds and in seconds per parameter times token, and what it takes
# per shape, a little less and a little more than on an H200: 8.6, 29 and 20 ms at 2.8e11, 7e12 and 1.2e13; 8 to 14 s.
SPARED_SECONDS, SPARED_PER_WORK = 6e-3, 1.2e-15
COMPILING_SECONDS = 12.0
# `auto` compiles where that spares so many times what it takes.
WORTH = 2.0
SHAPES_OF_PACKED_BATCHES = 4


@dataclass(frozen=True)
class Work:
    """What a process has to do.

    Attributes:
        longest: Tokens of the longest row.
        tokens: Tokens of a batch of one forward, on average.
        batches: Number of batches; `None` where it is not known.
        shapes: Lengths that batches are padded to.
    """

    longest: int
    tokens: float
    batches: int | None
    shapes: int


def work_of(recipe: Recipe, train: Encoded | TokenStream) -> Work:
    """The work of each process of a run.

    Args:
        recipe: The run.
        train: Rows to train on; of a stream, rows are taken to have half of the length that they may have.
    """
    size = recipe.per_device_train_batch_size
    rows = train.rows if isinstance(train, Encoded) else None
    lengths = range(1, train.longest + 1) if rows is None else [len(row["input_ids"]) for row in rows]
    mean = sum(lengths) / max(1, len(lengths))
    shapes = len({bucket_length(max(1, length), recipe.max_length) for length in lengths})
    batches = None
    if recipe.max_steps > 0:
        batches = recipe.max_steps * recipe.gradient_accumulation_steps
    elif rows is not None:
        batches = math.ceil(recipe.num_train_epochs * len(rows) / (size * num_processes()))
    return Work(train.longest, size * mean, batches, SHAPES_OF_PACKED_BATCHES if recipe.packing else shapes)


def choose_step_mode(num_parameters: int, batch_size: int, work: Work, device: torch.device) -> StepMode:
    """The mode that `auto` takes.

    Args:
        num_parameters: Parameters of the model.
        batch_size: Rows of a batch.
        work: What there is to do.
        device: Where it runs.
    """
    if device.type != "cuda":
        return "eager"
    compiles = compiling_pays(num_parameters, work)
    largest = num_parameters * batch_size * work.longest
    small = num_parameters <= GRAPH_MAX_PARAMETERS
    if compiles:
        return "compiled_graph" if small and largest <= GRAPH_MAX_COMPILED_WORK else "compile"
    return "graph" if small and largest <= GRAPH_MAX_WORK else "eager"


def compiling_pays(num_parameters: int, work: Work) -> bool:
    """Whether a run is long enough for `auto` to compile its steps.

    Args:
        num_parameters: Parameters of the model.
        work: What there is to do.
    """
    if work.batches is None:
        return False
    spared = work.batches * (SPARED_SECONDS + SPARED_PER_WORK * num_parameters * work.tokens)
    return spared >= WORTH * COMPILING_SECONDS * work.shapes


def resolve_step_mode(recipe: Recipe, model: PreTrainedModel, device: torch.device, work: Work) -> StepMode:
    """The mode of a run.

    Args:
        recipe: The run.
        model: The base model.
        device: Where it runs.
        work: What there is to do.

    Raises:
        GraphLoraError: The recipe wants steps recorded or compiled that cannot be.
    """
    if recipe.step_mode == "compile":
        reason = why_not_filled(recipe, model.config.get_text_config())
    else:
        reason = why_not_recorded(recipe, model, device)
    if recipe.step_mode not in ("auto", "eager") and reason is not None:
        raise GraphLoraError(f"step_mode is {recipe.step_mode}, but {reason}; set step_mode to auto or eager")
    if recipe.step_mode != "auto":
        return recipe.step_mode
    if reason is not None or recipe.loss_kernel == "liger" or getattr(model, "is_quantized", False):
        return "eager"
    chosen = choose_step_mode(model.num_parameters(), recipe.per_device_train_batch_size, work, device)
    if recipe.deterministic:
        # Compiled runs repeated their bits wherever that was compared (docs/reproducibility.md), but no promise of the
        # compiler's stands behind it.
        return "graph" if chosen in RECORDED else "eager"
    return chosen


def why_not_filled(recipe: Recipe, config: Any) -> str | None:
    """What keeps packed rows from being filled up, which takes one mask for all layers; `None` where nothing does.

    Args:
        recipe: The run.
        config: The model's text configuration.
    """
    attention = config._attn_implementation
    if recipe.packing and _slides(config, recipe.max_length):
        return "packing with a model of sliding attention needs two masks"
    if recipe.packing and attention not in MASKED_ATTENTION:
        return f"packed rows are filled up, which attn_implementation {attention} cannot mask (sdpa can)"
    return None


def _slides(config: Any, longest: int | None) -> bool:
    """Whether a row of this length sees less than all that is before it, in some layer."""
    kinds = set(getattr(config, "layer_types", None) or ())
    if "chunked_attention" in kinds:
        return True
    window = getattr(config, "sliding_window", None)
    slides = "sliding_attention" in kinds if kinds else window is not None
    return slides and (window is None or longest is None or longest > window)


def why_not_recorded(recipe: Recipe, model: PreTrainedModel, device: torch.device) -> str | None:
    """What keeps the steps of a run from being recorded; `None` where nothing does."""
    config: Any = model.config.get_text_config()
    attention = config._attn_implementation
    reasons = {
        f"CUDA graphs need an NVIDIA GPU, not {device.type}": device.type != "cuda",
        "several processes train together": num_processes() > 1,
        "one process uses several GPUs (start one process for each)": torch.cuda.device_count() > 1,
        "the model is spread over several devices": len(set(getattr(model, "hf_device_map", {}).values()))
        > 1,
        "gradient_checkpointing restores random states on the host": recipe.gradient_checkpointing,
        "fp16 looks at each loss on the host (bf16 does not)": recipe.fp16,
        "the backend eager of the adapter waits for the device": recipe.backend == "eager",
        f"attn_implementation {attention} may wait for the device (sdpa does not)": attention
        not in MASKED_ATTENTION,
    }
    return next((text for text, holds in reasons.items() if holds), why_not_filled(recipe, config))
