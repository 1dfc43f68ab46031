"""The part of the trainer that goes on from a checkpoint: as the recipe says now, and not at all from the run's end."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

from transformers import EarlyStoppingCallback, TrainerState, TrainingArguments

from graphlora.errors import GraphLoraError
from graphlora.training.checkpoints import STATE_FILE
from graphlora.training.guarded_trainer import GuardedTrainer

INTERVALS = ("logging_steps", "eval_steps", "save_steps")


class ResumedTrainer(GuardedTrainer):
    """`Trainer` that trains nothing where the checkpoint to go on from is the end of the run.

    Attributes:
        last_saved: The newest checkpoint: the one to go on from, later the last one written.
        patience: Validations without a gain after which the run ends; `None` for any number.
        threshold: What counts as a gain.
    """

    optimizer: Any
    last_saved: Path | None = None
    patience: int | None = None
    threshold: float = 0.0

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
        return (0, *values[1:]) if self._has_ended(max_steps) else values

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

    def _load_optimizer_and_scheduler(self, checkpoint: str | None) -> None:
        """Restore both; a learning rate, weight decay or interval that the recipe changed since takes effect."""
        # The checkpoint's state has brought the intervals of the recipe that it was written under.
        self.state.compute_steps(self.args, self.state.max_steps)
        if checkpoint is not None and self.state.best_global_step:
            # It has brought the path of the best one too, which is another where the run's folder was moved or copied.
            best = Path(checkpoint).parent / f"checkpoint-{self.state.best_global_step}"
            self.state.best_model_checkpoint = str(best)
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
