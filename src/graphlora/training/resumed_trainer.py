"""The part of the trainer that goes on from a checkpoint: as the recipe says now, and not at all from the run's end."""

from __future__ import annotations

import math
from dataclasses import replace
from pathlib import Path
from typing import Any

from transformers import EarlyStoppingCallback, TrainerState, TrainingArguments

from graphlora.errors import GraphLoraError
from graphlora.training.checkpoints import STATE_FILE
from graphlora.training.compared import Compared, best_validation, read_compared
from graphlora.training.guarded_trainer import GuardedTrainer

INTERVALS = ("logging_steps", "eval_steps", "save_steps")


class ResumedTrainer(GuardedTrainer):
    """`Trainer` that trains nothing where the checkpoint to go on from is the end of the run.

    Attributes:
        last_saved: The newest checkpoint: the one to go on from, later the last one written.
        patience: Validations without a gain after which the run ends; `None` for any number.
        threshold: What counts as a gain.
        compared: What validations measure; `None` for a trainer whose checkpoints do not say it.
    """

    optimizer: Any
    last_saved: Path | None = None
    patience: int | None = None
    threshold: float = 0.0
    compared: Compared | None = None
    _is_over = False

    def stop_early(self, patience: int, threshold: float) -> None:
        """End training after `patience` validations without a gain of more than `threshold`."""
        self.patience, self.threshold = patience, threshold
        self.add_callback(EarlyStoppingCallback(patience, threshold))

    def evaluate(self, *args: Any, **kwargs: Any) -> dict[str, float]:
        """As in `Trainer`; the step that ends a run early is saved, so that a resumed run finds the end again."""
        for callback in self.callback_handler.callbacks:
            if isinstance(callback, EarlyStoppingCallback) and self.patience is not None:
                # The checkpoint has brought its own, which the recipe may have changed.
                callback.early_stopping_patience = self.patience
                callback.early_stopping_threshold = self.threshold
        metrics = super().evaluate(*args, **kwargs)
        if self.control.should_training_stop:
            self.control.should_save = True
        return metrics

    def _determine_best_metric(self, metrics: dict[str, float], trial: Any) -> bool:
        """As in `Trainer`; a best one that is to be kept is saved, whether or not `save_steps` has come."""
        is_best = super()._determine_best_metric(metrics, trial)
        if is_best and self.args.load_best_model_at_end:
            self.control.should_save = True
        return is_best

    def set_initial_training_values(self, args: TrainingArguments, dataloader: Any) -> Any:
        """As in `Trainer`, but no epochs where nothing is left to train: `Trainer` would take a step and then look."""
        values = super().set_initial_training_values(args, dataloader)
        max_steps: Any = values[-1]
        # Whole numbers, as in a checkpoint: a share would be taken for another value and be warned of.
        for name in INTERVALS:
            if 0 < getattr(args, name) < 1:
                setattr(args, name, math.ceil(max_steps * getattr(args, name)))
        self._is_over = self._has_ended(max_steps)
        return (0, *values[1:]) if self._is_over else values

    def _has_ended(self, max_steps: int) -> bool:
        if self.last_saved is None:
            return False
        state = TrainerState.load_from_json(str(self.last_saved / STATE_FILE))
        if state.global_step >= max_steps:
            return True
        saved: Any = state.stateful_callbacks or {}
        stopping = saved.get(EarlyStoppingCallback.__name__)
        if self.patience is None or not stopping:
            return False
        return stopping["attributes"]["early_stopping_patience_counter"] >= self.patience

    def _choose_best(self, checkpoint: Path) -> None:
        """Find the best checkpoint of the run so far: it may lie elsewhere now, be gone, or be best by another measure.

        The checkpoint has brought the path, step and value of the one that was best when it was written.
        """
        metric = self.args.metric_for_best_model
        if self.compared is None or metric is None:
            return
        before = read_compared(checkpoint) or replace(self.compared, metric=None)
        changed = []
        if before.training != self.compared.training:
            self._tell(f"the training rows are not what they were at {checkpoint.name}; going on with these")
        if before.validation != self.compared.validation and not self._is_over:
            changed.append("validation rows")
            self.compared = replace(self.compared, since=self.state.global_step + 1)
        else:
            self.compared = replace(self.compared, since=before.since)
        if before.metric not in (None, metric):
            changed.append(f"metric_for_best_model ({before.metric}, now {metric})")
        best = best_validation(
            self.state.log_history,
            metric,
            bool(self.args.greater_is_better),
            checkpoint.parent if self.args.load_best_model_at_end else None,
            self.compared.since,
        )
        last, (step, value) = self.state.best_global_step, best or (None, None)
        self.state.best_global_step, self.state.best_metric = step, value
        self.state.best_model_checkpoint = (
            None if step is None else str(checkpoint.parent / f"checkpoint-{step}")
        )
        chosen = "none yet" if step is None else f"step {step}"
        if changed:
            self._tell(
                f"not what it was at {checkpoint.name}: {', '.join(changed)}; best validation: {chosen}"
            )
            for callback in self.callback_handler.callbacks:
                if isinstance(callback, EarlyStoppingCallback):
                    callback.early_stopping_patience_counter = 0
        elif last and last != step:
            self._tell(
                f"the best checkpoint, of step {last}, is gone; best of those that are there: {chosen}"
            )

    def _load_optimizer_and_scheduler(self, checkpoint: str | None) -> None:
        """Restore both; a learning rate, weight decay or interval that the recipe changed since takes effect."""
        # The checkpoint's state has brought the intervals of the recipe that it was written under.
        self.state.compute_steps(self.args, self.state.max_steps)
        if checkpoint is not None:
            self._choose_best(Path(checkpoint))
        if self.optimizer is None or self.lr_scheduler is None or checkpoint is None:
            return super()._load_optimizer_and_scheduler(checkpoint)
        decays = [group["weight_decay"] for group in self.optimizer.param_groups]
        rates = list(getattr(self.lr_scheduler, "base_lrs", []))
        try:
            super()._load_optimizer_and_scheduler(checkpoint)
        except ValueError as error:
            raise GraphLoraError(
                f"{checkpoint} is of a run that trained other parameters ({error}): its adapter was made by another "
                "recipe or another version; choose another output_dir"
            ) from error
        for group, decay in zip(self.optimizer.param_groups, decays, strict=True):
            group["weight_decay"] = decay
        scheduler: Any = self.lr_scheduler
        schedule = getattr(scheduler, "lr_lambdas", None)
        if schedule is not None and rates != list(scheduler.base_lrs):
            scheduler.base_lrs = rates
            step = scheduler.last_epoch
            for group, rate, shape in zip(self.optimizer.param_groups, rates, schedule, strict=True):
                group["initial_lr"], group["lr"] = rate, rate * shape(step)
            scheduler._last_lr = [group["lr"] for group in self.optimizer.param_groups]
        return None
