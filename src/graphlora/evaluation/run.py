"""One evaluation from a task's name to its record."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from torch import nn

from graphlora.evaluation.efficiency import count_parameters, device_name, measure
from graphlora.evaluation.encoding import Scoring
from graphlora.evaluation.multiple_choice import score_examples, summarize, write_items
from graphlora.records import RunRecord, data_hash
from graphlora.tasks import load_choices


def evaluate(
    model: nn.Module,
    tokenizer: Any,
    spec: str,
    split: str = "test",
    *,
    scoring: Scoring = "cloze",
    data_dir: str | Path | None = None,
    limit: int | None = None,
    seed: int = 0,
    name: str | None = None,
    output: str | Path | None = None,
    items: str | Path | None = None,
    tokens_per_batch: int | None = None,
    truncate: bool = False,
    progress: bool = True,
) -> RunRecord:
    """Accuracy of a model on one split of a task, as a record.

    Args:
        model: A causal language model of transformers, wrapped by PEFT or not.
        tokenizer: Its tokenizer.
        spec: Task name, data file or folder, or `hub:owner/name[:config]`.
        split: `"train"`, `"validation"` or `"test"`; for the user's own data also `"all"`.
        scoring: `"cloze"` or `"letter"`, see `score_examples`.
        data_dir: Folder with the task's files; without it, the hub.
        limit: Number of items, chosen by `seed`.
        seed: Seed of that choice.
        name: What the record calls the model, say an adapter's path; without it, the base model's name and the
            adapter's kind. It is a part of the configuration hash.
        output: File for the record (JSON).
        items: File for the scores of every item (JSON lines).
        tokens_per_batch: Most tokens per batch.
        truncate: Cut prompts that do not fit the model's window.
        progress: Show a progress bar.

    Returns:
        The record, of kind `"evaluation"`; its metrics are those of `summarize`, with `efficiency` beside them.

    Raises:
        GraphLoraError: Whatever `load_choices` and `score_examples` raise, or a place that cannot be written.
    """
    examples = load_choices(spec, split, data_dir=data_dir, limit=limit, seed=seed)
    weights = next(model.parameters())
    with measure(weights.device) as cost:
        results = score_examples(
            model,
            tokenizer,
            examples,
            scoring,
            tokens_per_batch=tokens_per_batch,
            truncate=truncate,
            progress=progress,
        )
        cost.samples, cost.tokens = len(results), sum(result.tokens for result in results)
    if items is not None:
        write_items(results, items)
    parameters = count_parameters(model)
    name = name or _name(model)
    record = RunRecord.create(
        kind="evaluation",
        config={
            "model": name,
            "task": spec,
            "split": split,
            "scoring": scoring,
            "limit": limit,
            "seed": seed,
            "truncate": truncate,
        },
        metrics=summarize(results)
        | {
            "efficiency": cost.summary()
            | {"trained_parameters": parameters.trained, "total_parameters": parameters.total}
        },
        model=name,
        seed=seed,
        device=device_name(weights.device),
        dtype=_dtype(model),
        wall_time=cost.wall_time,
        peak_memory=cost.peak_memory,
        data_hash=data_hash(examples),
    )
    if output is not None:
        record.write(output)
    return record


def _name(model: Any) -> str:
    """Name or path of the base model, and the active adapter's kind where there is one."""
    base = model.get_base_model() if hasattr(model, "get_base_model") else model
    name = str(base.config.name_or_path or type(base).__name__)
    config = getattr(model, "active_peft_config", None)
    return name if config is None else f"{name} + {getattr(config.peft_type, 'value', config.peft_type)}"


def _dtype(model: nn.Module) -> str:
    """The type that most weights have."""
    sizes: dict[torch.dtype, int] = {}
    for parameter in model.parameters():
        sizes[parameter.dtype] = sizes.get(parameter.dtype, 0) + parameter.numel()
    return str(max(sizes, key=lambda dtype: sizes[dtype])).removeprefix("torch.")
