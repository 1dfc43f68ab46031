"""The end of a run: its adapter written whole, and left alone where a resumed run had ended before."""

from __future__ import annotations

import shutil
from dataclasses import replace
from pathlib import Path

from huggingface_hub import ModelCard
from peft import PeftModel
from transformers import PreTrainedTokenizerBase

from graphlora.errors import GraphLoraError
from graphlora.records import RunRecord, flush
from graphlora.training.checkpoints import CARD_FILE, RECORD_FILE, STAGING, go_on_command, writing
from graphlora.training.manifest import REQUIRED, compare_files, read_manifest
from graphlora.training.recipe import Recipe
from graphlora.training.reproducing import make_manifest
from graphlora.training.trainer import AdapterTrainer

# What decides which checkpoint an ended run keeps.
CHOICE = ("metric_for_best_model", "load_best_model_at_end")


def record_of_ended(output: Path, steps: int) -> RunRecord | None:
    """The record that a run of that many steps wrote at its end; `None` where there is none."""
    try:
        record = RunRecord.read(output / RECORD_FILE)
    except GraphLoraError:
        return None
    return record if record.metrics.get("steps") == steps else None


def stands(output: Path, record: RunRecord, recipe: Recipe) -> bool:
    """Whether an ended run's adapter is what its record says, and the recipe chooses no other checkpoint."""
    if any(record.config.get(name) != getattr(recipe, name) for name in CHOICE):
        return False
    try:
        found = compare_files(output, read_manifest(output))
    except GraphLoraError:
        return False
    return all(found.get(name) == "as recorded" for name in (*REQUIRED, RECORD_FILE))


def chosen_anew(before: RunRecord, now: RunRecord) -> RunRecord:
    """The record of an ended run that keeps a checkpoint anew: what was measured while it trained stays."""
    same = before.metrics.get("kept_step") == now.metrics["kept_step"]
    if same and before.config_hash == now.config_hash:
        return before
    kept = {key: value for key, value in now.metrics.items() if _of_kept(key)}
    metrics = {key: value for key, value in before.metrics.items() if not _of_kept(key)} | kept
    return replace(
        now,
        metrics=metrics,
        data_hash=before.data_hash,
        wall_time=before.wall_time,
        peak_memory=before.peak_memory,
    )


def _of_kept(key: str) -> bool:
    return key == "kept_step" or key.startswith("eval_")


def save(model: PeftModel, output: Path) -> None:
    """Write the adapter (weights, config, model card) beside its final place and rename the files into it.

    A card that is there keeps its text, and one that cannot be read as a card stays as it is.

    Raises:
        GraphLoraError: The disk is full or cannot be written.
    """
    staging = output / STAGING
    kept = f"the checkpoints are kept; once that is mended, go on with: {go_on_command(output)}"
    with writing(output, kept):
        try:
            keeps = _take_card_along(output, staging)
            model.save_pretrained(str(staging))
            files = sorted(path for path in staging.iterdir() if path.name not in keeps)
            for path in files:
                flush(path)
            for path in files:
                path.replace(output / path.name)
            flush(output)
        finally:
            shutil.rmtree(staging, ignore_errors=True)


def seal(trainer: AdapterTrainer, model: PeftModel, tokenizer: PreTrainedTokenizerBase, output: Path) -> None:
    """Write the manifest that `graphlora verify` reads; the model computes its output as it will when it is used."""
    sharded = trainer.is_fsdp_enabled or trainer.is_deepspeed_enabled
    wrapped = {name: value for name, value in vars(model).items() if name in ("forward", "_original_forward")}
    try:
        # Takes the training's autocast off the model's forward.
        trainer.accelerator.unwrap_model(model, keep_fp32_wrapper=False)
        make_manifest(output, model, tokenizer, sharded=sharded).write(output)
    finally:
        vars(model).update(wrapped)


def _take_card_along(output: Path, staging: Path) -> set[str]:
    """Put a model card where PEFT goes on with it; the names of files that must stay as they are."""
    card = output / CARD_FILE
    if not card.is_file():
        return set()
    try:
        ModelCard.load(card)
    except Exception:  # whatever a YAML parser says of a text that was never meant for it
        return {CARD_FILE}
    staging.mkdir(exist_ok=True)
    shutil.copyfile(card, staging / CARD_FILE)
    return set()
