"""The trainer of a run: its arguments, batches and callbacks, from the recipe."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any, Literal

import torch
from peft import PeftModel
from transformers import PreTrainedTokenizerBase, TrainingArguments
from transformers.integrations.integration_utils import is_tensorboard_available
from transformers.trainer_callback import PrinterCallback, ProgressCallback

from graphlora.errors import GraphLoraError
from graphlora.records import data_hash
from graphlora.training.arguments import compiler_options, training_arguments
from graphlora.training.bucketing import Bucketed, bucket_positions
from graphlora.training.callbacks import Progress, StreamEpochs
from graphlora.training.compared import Compared
from graphlora.training.data import AnswerLogits, packing_collator, padding_collator, takes_answer_logits
from graphlora.training.full_rows import NoFullMask
from graphlora.training.packing import (
    BlockCollator,
    Layout,
    asks_for_sdpa,
    few_shapes,
    launched,
    one_block,
)
from graphlora.training.recipe import RECORDED, Recipe
from graphlora.training.run_data import RunData
from graphlora.training.step_mode import COMPILED, StepMode, why_not_filled
from graphlora.training.stream_setup import stream_loader
from graphlora.training.streaming import TokenStream
from graphlora.training.trainer import AdapterTrainer


def make_trainer(
    recipe: Recipe,
    model: PeftModel,
    tokenizer: PreTrainedTokenizerBase,
    data: RunData,
    dtype: torch.dtype,
    mode: StepMode = "eager",
    liger: dict[str, bool] | None = None,
    checkpoint: Path | None = None,
) -> AdapterTrainer:
    """The trainer of a run, with its callbacks.

    Args:
        recipe: The run, completed.
        model: The adapted model.
        tokenizer: Its tokenizer.
        data: Rows and items.
        dtype: Dtype of the frozen base.
        mode: How steps run (`resolve_step_mode`).
        liger: Kernels of Liger to use (`liger_options`).
        checkpoint: Where the run goes on from.

    Raises:
        GraphLoraError: Arguments that transformers refuses, or a tracker that is not installed.
    """
    if "tensorboard" in recipe.report_to and not is_tensorboard_available():
        raise GraphLoraError(
            "report_to is tensorboard, which is not installed; pip install tensorboard, or set report_to to none"
        )
    arguments = training_arguments(recipe, dtype, liger=liger)
    collate = collator(recipe, model, tokenizer, mode, arguments)
    stream = None
    if isinstance(data.train, TokenStream):
        stream = stream_loader(data.train, recipe, arguments, collate, checkpoint)
    try:
        trainer = AdapterTrainer(
            model=model,
            args=arguments,
            train_dataset=None if isinstance(data.train, TokenStream) else data.train.rows,
            stream=stream,
            blocks=recipe.packing,
            eval_dataset=data.validation.rows if data.validation else None,
            data_collator=collate,
            tokenizer=tokenizer,
            validation=data.items,
            scoring=recipe.scoring,
            loraplus_lr_ratio=recipe.loraplus_lr_ratio,
            keep_checkpoints=recipe.save_total_limit,
            truncate=recipe.truncation != "refuse",
            skips_nonfinite=recipe.on_nonfinite == "skip",
            max_skipped_steps=recipe.max_skipped_steps,
            row_names=getattr(data.train, "names", ()),
            records_steps=_how(recipe, mode, RECORDED),
            compiles_steps=_how(recipe, mode, COMPILED),
            compiler=compiler_options(recipe),
        )
    except GraphLoraError:
        raise
    except (RuntimeError, ImportError, ValueError) as error:
        raise GraphLoraError(f"cannot set up training: {' '.join(str(error).split())}") from error
    trainer.compared = Compared(
        None if isinstance(data.train, TokenStream) else data_hash(data.train.rows),
        None if data.validation is None else data_hash(data.validation.rows),
        arguments.metric_for_best_model,
    )
    trainer.remove_callback(PrinterCallback)
    if trainer.pop_callback(ProgressCallback) is not None:
        trainer.add_callback(Progress())
    if stream is not None:
        trainer.add_callback(StreamEpochs(lambda: stream.epochs))
    if recipe.early_stopping_patience is not None:
        trainer.stop_early(recipe.early_stopping_patience, recipe.early_stopping_threshold)
    return trainer


def _how(recipe: Recipe, mode: StepMode, modes: tuple[str, ...]) -> Literal["no", "yes", "if_possible"]:
    """Whether steps are treated as the modes do it, and must be because the recipe says so."""
    if mode not in modes:
        return "no"
    return "if_possible" if recipe.step_mode == "auto" else "yes"


def collator(
    recipe: Recipe,
    model: PeftModel,
    tokenizer: PreTrainedTokenizerBase,
    mode: StepMode,
    arguments: TrainingArguments,
) -> Callable[[Any], Any]:
    """What makes batches of rows: padded or packed, of few shapes where wanted, with logits where there are labels."""
    fill: Any = tokenizer.pad_token_id
    layout = _layout(recipe, model, mode, arguments) if recipe.packing else None
    collate: Callable[[Any], Any]
    if layout is not None:
        collate = BlockCollator(fill, layout)
    elif recipe.packing:
        collate = packing_collator()
    elif mode != "eager":
        collate = Bucketed(padding_collator(tokenizer), fill, recipe.max_length)
    else:
        collate = padding_collator(tokenizer)
    # Recorded steps take tensors that stay where they are, and a mask as well: one recording serves rows with and
    # without padding.
    if mode not in RECORDED and asks_for_sdpa(model.get_base_model()):
        collate = NoFullMask(collate)
    if not takes_answer_logits(model.get_base_model()):
        return collate
    return AnswerLogits(collate, None if mode == "eager" else bucket_positions)


def _layout(recipe: Recipe, model: PeftModel, mode: StepMode, arguments: TrainingArguments) -> Layout | None:
    """How rows are laid into blocks; `None` where they are joined as they come, and the model finds their borders."""
    base: Any = model.get_base_model()
    if why_not_filled(recipe, base.config.get_text_config()) is not None:
        return None
    # One process deals batches to several GPUs by their first dimension, which is the blocks' in a mask.
    if not asks_for_sdpa(base) or arguments.n_gpu > 1:
        return None if mode == "eager" else one_block
    return launched(arguments.device) if mode == "eager" else few_shapes
