"""What is watched while training: expert loads, signals, and the lines on the terminal."""

from __future__ import annotations

import sys
from collections.abc import Callable, Sequence
from typing import Any

from transformers import TrainerCallback, TrainerControl, TrainerState, TrainingArguments
from transformers.trainer_callback import ProgressCallback

from graphlora.training.interrupts import Interrupts

ROUTING = ("expert_load_max", "entropy", "dead_experts", "poisson_rate", "normal_scale")
MAX_LAYERS = 3


def routing_summary(model: Any, max_layers: int = MAX_LAYERS) -> dict[str, float]:
    """Routing of a GraphLoRA model in a number of values that does not grow with its depth.

    Args:
        model: Model wrapped by PEFT; any other adapter gives an empty summary.
        max_layers: FFN blocks that are reported one by one, spread over the depth.

    Returns:
        `router/<value>_{mean,min,max}` over the blocks, and `router/layer_<i>/<value>` of a few blocks. The
        values are `expert_load_max` (largest load over the fair share 1 / N), `entropy` (0 to 1),
        `dead_experts`, `poisson_rate` (lambda) and `normal_scale` (sigma).
    """
    stats = getattr(getattr(model, "base_model", None), "routing_stats", None)
    layers = [_values(layer) for layer in stats().values()] if stats is not None else []
    if not layers:
        return {}
    summary = {}
    for name in ROUTING:
        values = [layer[name] for layer in layers if name in layer]
        if values:
            summary[f"router/{name}_mean"] = sum(values) / len(values)
            summary[f"router/{name}_min"] = min(values)
            summary[f"router/{name}_max"] = max(values)
    for position in _spread(len(layers), max_layers):
        for name, value in layers[position].items():
            summary[f"router/layer_{position}/{name}"] = value
    return summary


class StreamEpochs(TrainerCallback):
    """Tells the epoch of a stream, whose loader has no end."""

    def __init__(self, epochs: Callable[[], float]) -> None:
        """Ask for passes over the data with `epochs`."""
        self._epochs = epochs

    def on_step_end(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        """Set the epoch before it is logged."""
        state.epoch = self._epochs()


class StopOnSignal(TrainerCallback):
    """On Ctrl-C or SIGTERM, saves a checkpoint after the step and ends training.

    Attributes:
        stopping: Whether a signal has ended training, of this process or of another one.
    """

    def __init__(self, interrupts: Interrupts, agree: Callable[[bool], bool] | None = None) -> None:
        """Start without a signal.

        Args:
            interrupts: The signals of this process.
            agree: With several processes, whether any of them got a signal; called at logging steps.
        """
        self.stopping = False
        self._interrupts = interrupts
        self._agree = agree

    def on_step_end(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        """Ask for a checkpoint and the end of training."""
        received = self._interrupts.number is not None
        if self._agree is not None:
            if state.global_step % max(1, int(state.logging_steps)) != 0:
                return
            received = self._agree(received)
        if received:
            self.stopping = True
            control.should_save = True
            control.should_training_stop = True

    def on_epoch_end(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        """Do not validate because an epoch "ended" in its middle: the resumed run would not."""
        between = state.epoch is not None and abs(state.epoch - round(state.epoch)) > 1e-6
        if self.stopping and control.should_training_stop and between:
            control.should_evaluate = False
            control.should_save = False


class Progress(ProgressCallback):
    """Progress bar with the time left, and one short line per log entry."""

    def on_log(
        self,
        args: TrainingArguments,
        state: TrainerState,
        control: TrainerControl,
        logs: dict[str, Any] | None = None,
        **kwargs: Any,
    ) -> None:
        """Write the values a person follows; trackers get all of them."""
        if state.is_world_process_zero and self.training_bar is not None and logs:
            line = log_line(logs, state.global_step)
            if line is not None:
                self.training_bar.write(line, file=sys.stderr)


def log_line(logs: dict[str, Any], step: int) -> str | None:
    """One line for the terminal; `None` for entries that only the record keeps."""
    if "loss" in logs:
        parts = [f"loss {logs['loss']:.4f}", f"lr {logs.get('learning_rate', 0):.2e}"]
        if "router/expert_load_max_max" in logs:
            parts.append(f"busiest expert {logs['router/expert_load_max_max']:.2f}x its share")
            parts.append(f"entropy {logs['router/entropy_mean']:.3f}")
            parts.append(f"dead experts {logs['router/dead_experts_max']:.0f}")
        return f"step {step}: " + ", ".join(parts)
    if "eval_loss" in logs:
        parts = [f"loss {logs['eval_loss']:.4f}"]
        parts += [
            f"{key.removeprefix('eval_')} {logs[key]:.4f}"
            for key in logs
            if key.startswith("eval_") and key.endswith(("acc", "acc_norm"))
        ]
        return f"step {step}: validation " + ", ".join(parts)
    return None


def _values(layer: dict[str, Any]) -> dict[str, float]:
    load: Sequence[float] = layer["expert_load"]
    values = {"expert_load_max": max(load) * len(load)}
    for name in ROUTING[1:]:
        if layer.get(name) is not None:
            values[name] = float(layer[name])
    return values


def _spread(count: int, wanted: int) -> list[int]:
    """At most `wanted` of `count` positions, the first and the last among them."""
    if count <= wanted:
        return list(range(count))
    return sorted({round(step * (count - 1) / (wanted - 1)) for step in range(wanted)})
