"""One training run: from a recipe to an adapter with the record of how it came to be."""

from __future__ import annotations

import pickle
import signal
import sys
import time
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
from peft import PeftModel
from transformers import PreTrainedTokenizerBase, set_seed

from graphlora.errors import GraphLoraError
from graphlora.records import RunRecord, data_hash, write_text
from graphlora.training.adapting import add_adapter, check_backend
from graphlora.training.arguments import needed_bytes
from graphlora.training.callbacks import StopOnSignal
from graphlora.training.checkpoints import (
    RECIPE_FILE,
    RECORD_FILE,
    check_space,
    checkpoint_processes,
    go_on_command,
    last_checkpoint,
    prepare_output,
    refused_pickle,
    remove_run,
    withdraw_recipe,
)
from graphlora.training.data import (
    Encoded,
)
from graphlora.training.determinism import deterministic_algorithms
from graphlora.training.finishing import chosen_anew, record_of_ended, save, seal, stands
from graphlora.training.interrupts import Interrupts, TrainingInterrupted
from graphlora.training.loading import pick_device, pick_dtype
from graphlora.training.loss_kernel import liger_options
from graphlora.training.manifest import MANIFEST_FILE
from graphlora.training.measuring import peak_memory, peak_reserved, start_measuring
from graphlora.training.nonfinite import NonFiniteError
from graphlora.training.out_of_memory import Facts, explained_memory
from graphlora.training.processes import check_sharded, is_first, num_processes, start_processes, uses_cpu
from graphlora.training.recipe import Recipe
from graphlora.training.resolving import completed, located
from graphlora.training.resuming import check_same_run
from graphlora.training.run_data import RunData, chosen_metric
from graphlora.training.step_mode import resolve_step_mode, work_of
from graphlora.training.streaming import BadRow, TokenStream
from graphlora.training.trainer import AdapterTrainer
from graphlora.training.trainer_setup import make_trainer
from graphlora.training.workbench import Workbench


@dataclass
class TrainResult:
    """What a run leaves.

    Attributes:
        output_dir: Directory with the adapter, `config.yaml`, `record.json` and the checkpoints.
        metrics: Training loss and speed, and the validation metrics of the kept checkpoint.
        record: The record that was written.
        model: The trained model; the best checkpoint's weights where one was chosen.
        tokenizer: Its tokenizer.
        history: Log entries of training and validation, each with its `step`.
    """

    output_dir: Path
    metrics: dict[str, Any]
    record: RunRecord
    model: PeftModel
    tokenizer: PreTrainedTokenizerBase
    history: list[dict[str, Any]]


def train(
    recipe: Recipe, *, resume: bool = False, overwrite: bool = False, workbench: Workbench | None = None
) -> TrainResult:
    """Run a recipe with `transformers.Trainer`.

    Args:
        recipe: The run.
        resume: Go on from the newest whole checkpoint in `output_dir`, if there is one.
        overwrite: Replace the run in `output_dir`.
        workbench: Where model and data come from; left out: they are loaded for this run.

    Returns:
        The trained model and the record; the files are in `output_dir`.

    Raises:
        GraphLoraError: A mistake in the recipe or the data, a full disk, a loss that is not finite.
        TrainingInterrupted: Ctrl-C or SIGTERM; a checkpoint was saved.
    """
    if resume and overwrite:
        raise GraphLoraError("--resume and --overwrite are both given; choose one")
    recipe = located(recipe)
    workbench = workbench or Workbench()
    interrupts = Interrupts()
    if workbench.takes_signals:
        interrupts.install()
    try:
        with explained_memory(recipe) as facts, deterministic_algorithms(recipe.deterministic):
            return _train(recipe, resume, overwrite, workbench, interrupts, facts)
    except TrainingInterrupted:
        raise
    except KeyboardInterrupt as error:
        raise _interrupted(Path(recipe.output_dir), interrupts.number) from error
    finally:
        interrupts.restore()


def _train(
    recipe: Recipe, resume: bool, overwrite: bool, workbench: Workbench, interrupts: Interrupts, facts: Facts
) -> TrainResult:
    started = time.perf_counter()
    output = Path(recipe.output_dir)
    checkpoint = _start(recipe, output, resume, overwrite)
    start_processes(recipe)
    device = pick_device("cpu" if uses_cpu(recipe) else "auto")
    start_measuring(device)
    dtype = pick_dtype(recipe.dtype, device)
    tokenizer = workbench.tokenizer(recipe)
    base = workbench.base_model(recipe, dtype, device)
    recipe = completed(recipe, base.config, dtype)
    facts.recipe, facts.config, facts.device, facts.dtype = recipe, base.config, device, dtype
    data = workbench.data(recipe, tokenizer)
    facts.rows = getattr(data.train, "rows", None)
    mode = resolve_step_mode(recipe, base, device, work_of(recipe, data.train))
    liger = liger_options(recipe, base.config.model_type, device, mode)
    recipe = recipe.changed(metric_for_best_model=chosen_metric(recipe, data))
    set_seed(recipe.seed)
    model = add_adapter(base, recipe)
    check_backend(model, device)
    num_trained = sum(p.numel() for p in model.parameters() if p.requires_grad)
    check_space(output, needed_bytes(recipe, num_trained))
    trainer = make_trainer(recipe, model, tokenizer, data, dtype, mode, liger, checkpoint)
    check_sharded(trainer.is_fsdp_enabled, device)
    for callback in workbench.callbacks(trainer):
        trainer.add_callback(callback)
    recipe_before = _text(output / RECIPE_FILE)
    with _begun(trainer, recipe, output, overwrite):
        if trainer.is_world_process_zero() and not workbench.quiet:
            _tell(recipe, data, num_trained, checkpoint, resume)
        metrics = _run(trainer, recipe, checkpoint, interrupts)
    before = None if "train_seconds" in metrics else record_of_ended(output, metrics["steps"])
    if "train_seconds" not in metrics and trainer.is_world_process_zero() and not workbench.quiet:
        sys.stderr.write(f"the run had ended at step {metrics['steps']}; nothing was left to train\n")
    if before is not None and stands(output, before, recipe):
        if recipe_before is not None and trainer.is_world_process_zero():
            write_text(output / RECIPE_FILE, recipe_before)
        return TrainResult(output, before.metrics, before, model, tokenizer, trainer.state.log_history)
    how = {"step_mode": mode, "loss_kernel": "none" if liger is None else "liger"}
    metrics |= {"num_trained": num_trained} | how
    record = _record(recipe, data, metrics, device, time.perf_counter() - started)
    if before is not None:
        record = chosen_anew(before, record)
    if trainer.is_world_process_zero():
        for name in (MANIFEST_FILE, RECORD_FILE):
            (output / name).unlink(missing_ok=True)
        save(model, output)
        record.write(output / RECORD_FILE)
        seal(trainer, model, tokenizer, output)
    return TrainResult(output, metrics, record, model, tokenizer, trainer.state.log_history)


def _text(path: Path) -> str | None:
    return path.read_text(encoding="utf-8") if path.is_file() else None


def _start(recipe: Recipe, output: Path, resume: bool, overwrite: bool) -> Path | None:
    """Make the output directory ready; the checkpoint to go on from."""
    if is_first():
        checkpoint = prepare_output(output, resume=resume, overwrite=overwrite)
    else:
        checkpoint = last_checkpoint(output) if resume else None
    if resume and (output / RECIPE_FILE).is_file():
        before = None if checkpoint is None else checkpoint_processes(checkpoint)
        check_same_run(
            Recipe.from_yaml(output / RECIPE_FILE), recipe, (before or num_processes(), num_processes())
        )
    return checkpoint


@contextmanager
def _begun(trainer: AdapterTrainer, recipe: Recipe, output: Path, overwrite: bool) -> Iterator[None]:
    """A run whose recipe is written; where it fails before its first checkpoint, the recipe is taken away again.

    So the corrected command finds no run in its way. A loss that is not finite leaves the recipe: its message names it.
    """
    with ExitStack() as stack:
        if trainer.is_world_process_zero():
            if not (output / RECIPE_FILE).exists():
                stack.callback(withdraw_recipe, output)
            if overwrite:
                remove_run(output)
            write_text(output / RECIPE_FILE, recipe.to_yaml())
        try:
            yield
        except NonFiniteError:
            stack.pop_all()
            raise
        stack.pop_all()


def _record(
    recipe: Recipe, data: RunData, metrics: dict[str, Any], device: torch.device, wall_time: float
) -> RunRecord:
    memory = peak_memory(device)
    train_rows, num_rows = _rows_of(data, metrics)
    form = {"prompt_format": data.prompt_format, "prompt_template": data.prompt_template}
    return RunRecord.create(
        "training",
        asdict(recipe),
        metrics | form | {"peak_memory": memory, "peak_reserved": peak_reserved(device), "rows": num_rows},
        model=recipe.model,
        seed=recipe.seed,
        device=torch.cuda.get_device_name() if device.type == "cuda" else str(device),
        dtype=recipe.dtype,
        wall_time=wall_time,
        peak_memory=memory,
        data_hash=data_hash([*train_rows, *(data.validation.rows if data.validation else [])]),
    )


def _rows_of(data: RunData, metrics: dict[str, Any]) -> tuple[list[Any], int]:
    """What identifies the training rows, and their number: of a stream those that the run took."""
    if isinstance(data.train, TokenStream):
        return [data.train.fingerprint], metrics["rows_taken"]
    return data.train.rows, len(data.train.rows)


def _run(
    trainer: AdapterTrainer, recipe: Recipe, checkpoint: Path | None, interrupts: Interrupts
) -> dict[str, Any]:
    """Train; the metrics of the run."""
    several = trainer.accelerator.num_processes > 1
    stop = StopOnSignal(interrupts, _any_process(trainer) if several else None)
    trainer.add_callback(stop)
    trainer.last_saved = checkpoint
    interrupts.finishes_step = True
    try:
        result = trainer.train(resume_from_checkpoint=str(checkpoint) if checkpoint is not None else None)
        trainer.settle()
    except (NonFiniteError, BadRow) as error:
        raise _explained(error, recipe, trainer.last_saved) from error
    except pickle.UnpicklingError as error:
        raise refused_pickle(checkpoint, error) from error
    if stop.stopping:
        raise _interrupted(Path(recipe.output_dir), interrupts.number)
    return _metrics(
        trainer, result, first_step=0 if checkpoint is None else int(checkpoint.name.rpartition("-")[2])
    )


def _metrics(trainer: AdapterTrainer, result: Any, first_step: int) -> dict[str, Any]:
    state = trainer.state
    chosen = trainer.args.load_best_model_at_end and state.best_global_step
    step = state.best_global_step if chosen else state.global_step
    validations = [entry for entry in state.log_history if "eval_loss" in entry]
    kept = next((entry for entry in reversed(validations) if entry["step"] == step), {})
    speed = ("runtime", "samples_per_second", "steps_per_second")
    return {
        "steps": state.global_step,
        "epochs": state.epoch,
        "kept_step": step,
        **{k: v for k, v in kept.items() if k.startswith("eval_") and not k.endswith(speed)},
        **({} if trainer.stream is None else {"rows_taken": trainer.stream.place.row}),
        **_measured(trainer, result, state.global_step - first_step),
    }


def _measured(trainer: AdapterTrainer, result: Any, steps: int) -> dict[str, float]:
    """Loss and speed of the steps that were trained; nothing where none was left."""
    if steps == 0:
        return {}
    seconds = max(1e-9, result.metrics["train_runtime"] - trainer.seconds_aside)
    tokens: Any = torch.as_tensor(trainer.tokens_seen, device=trainer.args.device)
    if trainer.accelerator.num_processes > 1:
        tokens = trainer.accelerator.reduce(tokens, reduction="sum")
    return {
        "train_loss": result.training_loss,
        "step_time": seconds / steps,
        "tokens_per_second": int(tokens) / seconds,
        "train_seconds": seconds,
    }


def _explained(
    error: NonFiniteError | BadRow, recipe: Recipe, last: Path | None
) -> NonFiniteError | GraphLoraError:
    if isinstance(error, BadRow):
        if last is None:
            return error
        command = go_on_command(Path(recipe.output_dir))
        return GraphLoraError(f"{error}; mend the row and go on from {last} with: {command}")
    where = f"the last good checkpoint is {last}" if last is not None else "no checkpoint had been saved yet"
    return NonFiniteError(
        f"{error}: training stopped; {where}. Lower learning_rate (now {recipe.learning_rate}), use a longer "
        f"warm-up, float32, or on_nonfinite skip; go on with: {go_on_command(Path(recipe.output_dir))} --learning_rate "
        f"{recipe.learning_rate / 4:g}"
    )


def _interrupted(output: Path, number: int | None) -> TrainingInterrupted:
    """What a run that got a signal says; `None` where another process got it."""
    last = last_checkpoint(output)
    number = number or signal.SIGTERM
    if last is None:
        return TrainingInterrupted("stopped before the first checkpoint; nothing was saved", number)
    return TrainingInterrupted(f"stopped; saved {last}. Go on with: {go_on_command(output)}", number)


def _any_process(trainer: AdapterTrainer) -> Any:
    def agree(mine: bool) -> bool:
        flag = torch.tensor([int(mine)], device=trainer.args.device)
        gathered: Any = trainer.accelerator.gather(flag)
        return bool(gathered.sum())

    return agree


def _described(train: Encoded | TokenStream, recipe: Recipe) -> str:
    if isinstance(train, TokenStream):
        count = train.examples.epoch_rows
        return f"{'rows' if count is None else f'{count:,} rows'} of {recipe.task}, read while training"
    rows, tokens = len(train.rows), train.num_tokens
    return f"{rows:,} rows of {recipe.task}, {tokens:,} tokens, longest {train.longest}"


def _tell(recipe: Recipe, data: RunData, num_trained: int, checkpoint: Path | None, resume: bool) -> None:
    lines = [
        f"{recipe.method} on {recipe.model} ({recipe.dtype}): {num_trained:,} parameters to train",
        f"{_described(data.train, recipe)}; output in {recipe.output_dir}",
    ]
    if recipe.method == "graphlora" and not recipe.training_args.get("disable_tqdm"):
        lines.append("loss: of steps with the routers' losses, of validations without them")
    for name, part in (("training", data.train), ("validation", data.validation)):
        if isinstance(part, Encoded) and (part.num_cut or part.num_dropped):
            lines.append(
                f"{name}: {part.num_cut} row(s) cut and {part.num_dropped} left out, longer than "
                f"{recipe.max_length} tokens"
            )
    if checkpoint is not None:
        lines.append(f"going on from {checkpoint}")
    elif resume:
        lines.append("no whole checkpoint to go on from; starting at the beginning")
    sys.stderr.write("\n".join(lines) + "\n")
