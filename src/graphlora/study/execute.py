"""One run of a study: train as `graphlora train` does, score, and say what came out."""

from __future__ import annotations

import json
import math
import shutil
import time
from collections.abc import Sequence
from contextlib import ExitStack
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

import torch
from peft import PeftModel

from graphlora.errors import GraphLoraError
from graphlora.evaluation.efficiency import device_name
from graphlora.evaluation.multiple_choice import score_examples, summarize
from graphlora.records import RunRecord, config_hash, data_hash
from graphlora.study.health import routing_health
from graphlora.study.kept import KeptWorkbench
from graphlora.study.plan import PLACES, Run
from graphlora.study.spec import BASE
from graphlora.training.checkpoints import (
    CONFIG_FILE,
    RECIPE_FILE,
    STATE_FILE,
    WEIGHTS_FILE,
    last_checkpoint,
)
from graphlora.training.loading import pick_device, pick_dtype
from graphlora.training.measuring import peak_memory, peak_reserved, start_measuring
from graphlora.training.recipe import Recipe
from graphlora.training.run import TrainResult, train
from graphlora.training.run_data import RunData

KIND = "study"
SCORES = ("acc", "acc_stderr", "acc_norm", "acc_norm_stderr")
SPEED = ("step_time", "tokens_per_second", "train_seconds", "steps", "kept_step", "num_trained", "step_mode")
# A process may not say more than once what differs between a run and the one before.
QUIET = {"disable_tqdm": True}


def execute(run: Run, workbench: KeptWorkbench, work: Path, keep: Path | None = None) -> RunRecord:
    """Do one run.

    Args:
        run: The run.
        workbench: What earlier runs of this process have loaded.
        work: Folder for checkpoints; a run that was killed goes on from there. It is removed at the end.
        keep: Folder for the adapter, where it is to stay.

    Returns:
        The record; it is not written yet.

    Raises:
        GraphLoraError: Whatever `train` and `score_examples` raise.
        KeyboardInterrupt: Ctrl-C.
    """
    with ExitStack() as stack:
        # A run that fails may leave its adapter on the base model.
        stack.callback(workbench.forget_base)
        record = (
            _execute_base(run, workbench) if run.variant == BASE else _execute(run, workbench, work, keep)
        )
        stack.pop_all()
    shutil.rmtree(work, ignore_errors=True)
    return record


def _execute(run: Run, workbench: KeptWorkbench, work: Path, keep: Path | None) -> RunRecord:
    started = time.perf_counter()
    recipe = run.recipe(work)
    recipe = recipe.changed(training_args={**recipe.training_args, **QUIET})
    if run.match is not None:
        recipe = _matched(recipe, run, workbench)
    _drop_uneven_checkpoints(work)
    result = train(recipe, resume=True, workbench=workbench)
    recipe = Recipe.from_yaml(work / RECIPE_FILE)
    data = workbench.data(recipe, result.tokenizer)
    metrics = _trained(recipe, result, workbench) | {"validation": validation_scores(run, result, data)}
    items = _test_items(run, workbench)
    if items:
        metrics["test"] = _scores(result.model, result.tokenizer, items, recipe)
    rows = data.validation.rows if data.validation is not None else []
    if routing := routing_health(result.model, rows):
        metrics["routing"] = routing
    record = _record(run, recipe, metrics, started, items, adapter=_adapter_config(result.model))
    seen = {"train": result.record.data_hash, "test": record.data_hash}
    if keep is not None:
        _keep(work, keep)
    workbench.put_back(result.model, reusable=_is_reusable(recipe, result))
    return replace(record, data_hash=config_hash(seen))


def _drop_uneven_checkpoints(work: Path) -> None:
    """Begin anew where the last checkpoint is between two log lines: the curve would not be the same.

    At the end of the run there is nothing left to add to the curve.
    """
    last = last_checkpoint(work)
    if last is None:
        return
    state = json.loads((last / STATE_FILE).read_text(encoding="utf-8"))
    step, interval = state["global_step"], max(1, int(state.get("logging_steps") or 1))
    if step < state["max_steps"] and step % interval:
        shutil.rmtree(work, ignore_errors=True)


def _execute_base(run: Run, workbench: KeptWorkbench) -> RunRecord:
    started = time.perf_counter()
    recipe = run.recipe()
    device, dtype = _device_and_dtype(recipe)
    start_measuring(device)
    tokenizer = workbench.tokenizer(recipe)
    model = workbench.base_model(recipe, dtype, device)
    split = "test" if run.evaluate == "test" else "validation"
    limit = run.test_limit if split == "test" else recipe.eval_limit
    items = {
        name: workbench.test_items(spec, split, recipe.data_dir, limit) for name, spec in run.parts.items()
    }
    scores = {} if run.metric == "loss" else _scores(model, tokenizer, items, recipe)
    recipe = recipe.changed(dtype=str(dtype).removeprefix("torch."))
    return _record(run, recipe, {"method": BASE, split: scores, "baseline": scores}, started, items)


def _device_and_dtype(recipe: Recipe) -> tuple[torch.device, torch.dtype]:
    device = pick_device("cpu" if recipe.training_args.get("use_cpu") else "auto")
    return device, pick_dtype(recipe.dtype, device)


def _matched(recipe: Recipe, run: Run, workbench: KeptWorkbench) -> Recipe:
    """The recipe with the rank that gives the wanted number of parameters, and its scaling as it was."""
    assert run.match is not None
    device, dtype = _device_and_dtype(recipe)
    base = workbench.base_model(recipe, dtype, device)
    target = Recipe.from_dict({**run.match, "output_dir": recipe.output_dir})
    rank = workbench.matched_rank(recipe, target, base)
    before, alpha = recipe.r or 8, recipe.lora_alpha or 16
    power = 0.5 if recipe.use_rslora else 1.0
    return recipe.changed(r=rank, lora_alpha=alpha * (rank / before) ** power)


def _test_items(run: Run, workbench: KeptWorkbench) -> dict[str, list[Any]]:
    """Items of the test splits; none where the study leaves them alone."""
    if run.evaluate != "test":
        return {}
    folder = run.options.get("data_dir")
    return {
        name: workbench.test_items(spec, "test", folder, run.test_limit) for name, spec in run.parts.items()
    }


def _scores(model: Any, tokenizer: Any, items: dict[str, list[Any]], recipe: Recipe) -> dict[str, Any]:
    found = {}
    for name, examples in items.items():
        cuts = recipe.truncation != "refuse"
        results = score_examples(model, tokenizer, examples, recipe.scoring, truncate=cuts, progress=False)
        summary = summarize(results)
        found[name] = {key: summary[key] for key in SCORES if key in summary} | {"num": summary["n"]}
        if "domains" in summary:
            found[name]["acc_by_domain"] = {
                part: values["acc"] for part, values in summary["domains"].items()
            }
        if "kinds" in summary:
            found[name]["acc_by_kind"] = {part: values["acc"] for part, values in summary["kinds"].items()}
    return found


def validation_scores(run: Run, result: TrainResult, data: RunData) -> dict[str, Any]:
    """Scores of the kept checkpoint on the validation rows, as the trainer measured them when it chose."""
    metrics = result.metrics
    found: dict[str, Any] = {}
    names = {spec: name for name, spec in run.parts.items()}
    single = len(data.items) == 1
    for spec, items in data.items.items():
        values: dict[str, Any] = {"num": len(items)}
        for name in ("acc", "acc_norm"):
            key = f"eval_{name}" if single else f"eval_{spec}_{name}"
            if key in metrics:
                values[name] = metrics[key]
                values[f"{name}_stderr"] = _stderr(metrics[key], len(items))
        found[names.get(spec, spec)] = values
    if not found and "eval_loss" in metrics and data.validation is not None:
        found[run.task] = {"num": len(data.validation.rows)}
    for values in found.values():
        values["loss"] = metrics.get("eval_loss")
    return found


def _trained(recipe: Recipe, result: TrainResult, workbench: KeptWorkbench) -> dict[str, Any]:
    metrics = {name: result.metrics[name] for name in SPEED if name in result.metrics}
    median = workbench.clock.median() if workbench.clock is not None else None
    if median is not None:
        metrics["step_time"] = median
    losses = [entry for entry in result.history if "loss" in entry]
    steps = [
        entry["step"] - before
        for entry, before in zip(losses, [0, *(e["step"] for e in losses)], strict=False)
    ]
    total = sum(entry["loss"] * count for entry, count in zip(losses, steps, strict=True))
    metrics["train_loss"] = total / max(1, sum(steps))
    return metrics | {"method": method_name(recipe), "curve": curve(result.history)}


def method_name(recipe: Recipe) -> str:
    """Name of the method of a recipe: a preset's, or that of a kind of LoRA."""
    if recipe.method != "lora":
        return recipe.preset or recipe.method
    kinds = {"dora": recipe.use_dora, "rslora": recipe.use_rslora, "loraplus": recipe.loraplus_lr_ratio}
    return next((name for name, holds in kinds.items() if holds), "lora")


def curve(history: Sequence[dict[str, Any]]) -> list[dict[str, Any]]:
    """Loss and validation by step, of the trainer's log."""
    points: dict[int, dict[str, Any]] = {}
    names = ("loss", "aux_loss", "eval_loss", "eval_acc", "eval_acc_norm")
    for entry in history:
        found = {name: entry[name] for name in names if name in entry}
        if found:
            points.setdefault(int(entry["step"]), {"step": int(entry["step"])}).update(found)
    return [points[step] for step in sorted(points)]


def _record(
    run: Run,
    recipe: Recipe,
    metrics: dict[str, Any],
    started: float,
    items: dict[str, list[Any]],
    adapter: dict[str, Any] | None = None,
) -> RunRecord:
    config: dict[str, Any] = asdict(recipe)
    config = {name: value for name, value in config.items() if name not in PLACES}
    config["training_args"] = {k: v for k, v in recipe.training_args.items() if k not in QUIET}
    config |= {"model": run.model, "task": run.task, "tasks": list(run.parts), "policy": run.policy}
    config |= {"adapter": adapter} if adapter is not None else {}
    scores = metrics.get(run.evaluate) or {}
    values = [part[run.metric] for part in scores.values() if part.get(run.metric) is not None]
    device, _ = _device_and_dtype(recipe)
    # Runs beside each other share what each has taken, not what each uses.
    taken = {} if device.type != "cuda" else {"peak_reserved": peak_reserved(device)}
    record = RunRecord.create(
        KIND,
        config,
        {
            **taken,
            "task": run.task,
            "metric": run.metric,
            "score": sum(values) / len(values) if values else None,
            **metrics,
        },
        study=run.study,
        variant=run.variant,
        model=run.model,
        seed=run.seed,
        device=device_name(device),
        dtype=recipe.dtype,
        wall_time=time.perf_counter() - started,
        peak_memory=peak_memory(device),
        data_hash=data_hash([item for part in items.values() for item in part]),
    )
    return replace(record, run_id=run.run_id)


def _adapter_config(model: PeftModel) -> dict[str, Any]:
    """The adapter's resolved config; sets become sorted lists, and places on this machine stay out."""
    values = model.peft_config["default"].to_dict()
    left_out = {"base_model_name_or_path", "auto_mapping", "revision", "inference_mode"}
    return {
        name: sorted(value) if isinstance(value, (set, frozenset)) else value
        for name, value in values.items()
        if name not in left_out and value is not None
    }


def _is_reusable(recipe: Recipe, result: TrainResult) -> bool:
    """Whether training leaves nothing on the base model: these options patch or wrap it."""
    return result.metrics.get("loss_kernel", "none") == "none" and not recipe.gradient_checkpointing


def _keep(output: Path, keep: Path) -> None:
    shutil.rmtree(keep, ignore_errors=True)
    keep.mkdir(parents=True)
    for name in (WEIGHTS_FILE, CONFIG_FILE, RECIPE_FILE):
        if not (output / name).is_file():
            raise GraphLoraError(f"{output} has no {name} to keep")
        shutil.copy2(output / name, keep / name)


def _stderr(accuracy: float, count: int) -> float | None:
    return math.sqrt(accuracy * (1 - accuracy) / (count - 1)) if count > 1 else None
