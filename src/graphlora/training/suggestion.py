"""What a user may have meant by an unknown name."""

from __future__ import annotations

import difflib

# What options are called by other tools; their spelling is too far from ours, or nearer to another of ours.
ELSEWHERE = {
    "alpha": "lora_alpha",
    "base_model": "model",
    "batch_size": "per_device_train_batch_size",
    "data": "task",
    "dataset": "task",
    "dataset_name": "task",
    "dropout": "lora_dropout",
    "epochs": "num_train_epochs",
    "grad_accum": "gradient_accumulation_steps",
    "lora_r": "r",
    "lora_rank": "r",
    "lora_target_modules": "target_modules",
    "lr": "learning_rate",
    "lr_scheduler": "lr_scheduler_type",
    "max_seq_length": "max_length",
    "micro_batch_size": "per_device_train_batch_size",
    "model_name": "model",
    "model_name_or_path": "model",
    "num_epochs": "num_train_epochs",
    "output": "output_dir",
    "output_path": "output_dir",
    "rank": "r",
    "resume_from_checkpoint": "resume",
    "sequence_len": "max_length",
    "train_batch_size": "per_device_train_batch_size",
    "train_file": "task",
}


def suggestion(name: str, known: set[str]) -> str:
    """`"; did you mean 'x'?"` where a known name is close, else nothing."""
    dashes = "--" if name.startswith("--") else ""
    elsewhere = dashes + ELSEWHERE.get(name.removeprefix("--"), "")
    if elsewhere in known:
        return f"; did you mean {elsewhere!r}?"
    close = difflib.get_close_matches(name[:80], sorted(known), n=1, cutoff=0.6)
    return f"; did you mean {close[0]!r}?" if close else ""
