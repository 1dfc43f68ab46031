"""Steps whose loss or gradient is not finite: they change nothing, and end the run or are left out.

On a GPU the host does not wait for the device to find out. The flag of a step stays on the device, where the fused
optimizer reads it and does nothing, and is copied to the host, which looks at it one step later.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn

from graphlora.errors import GraphLoraError


class NonFiniteError(GraphLoraError):
    """A loss, gradient or weight is not finite; the message names step, layer and rows."""


@dataclass
class Step:
    """One optimizer step.

    Attributes:
        number: Counted from 1.
        batches: Its micro-batches, as the data loader gave them.
        num_items: Labels of all of them, which the loss is divided by.
        random: State of the random generators at its beginning.
        values: `[3]` the sum of the losses, the gradient's norm, and whether either is not finite in some process.
        copied: When `values` has arrived on the host; `None` where there is nothing to wait for.
    """

    number: int
    num_items: Any
    random: dict[torch.device | None, Tensor]
    batches: list[dict[str, Any]] = field(default_factory=list)
    values: Tensor | None = None
    copied: torch.cuda.Event | None = None


class NonFiniteGuard:
    """Keeps weights, optimizer and loads free of steps that are not finite.

    A step that is left out changes nothing that training keeps: weights, the optimizer's state, expert loads and the
    routers' running means stay as they were. The schedule and the number of the step go on.

    Attributes:
        num_skipped: Steps left out so far.
    """

    def __init__(
        self,
        model: nn.Module,
        optimizer: Any,
        *,
        skip: bool,
        max_skipped: int,
        scaled: bool,
        several: bool,
        explain: Callable[[Step], str],
        tell: Callable[[str], None],
        waits: bool | None = None,
    ) -> None:
        """Watch a model's steps.

        Args:
            model: The adapted model.
            optimizer: Its optimizer, without accelerate's wrapper.
            skip: Leave such steps out; otherwise the first one ends the run.
            max_skipped: How many may be left out.
            scaled: A loss scaler (fp16) is at work, which leaves out overflowing gradients by itself.
            several: Several processes train together and must agree.
            explain: Finds batch and layer of a step, in words; it runs the step again.
            tell: Called with a line for each step that is left out.
            waits: Whether to look at each step before the optimizer; left out: on a CPU, and for steps to leave out
                with optimizers that cannot read the flag on the device.
        """
        self.num_skipped = 0
        self._model, self._optimizer = model, optimizer
        self._skip, self._max_skipped, self._scaled, self._several = skip, max_skipped, scaled, several
        self._explain, self._tell = explain, tell
        self._parameters = [p for p in model.parameters() if p.requires_grad]
        device = self._parameters[0].device
        self._reads_flag = bool(getattr(optimizer, "_step_supports_amp_scaling", False)) and not scaled
        can_stay_clean = self._reads_flag or scaled
        self._waits = (device.type == "cpu" or (skip and not can_stay_clean)) if waits is None else waits
        self._is_clean = self._waits or can_stay_clean
        running = getattr(getattr(model, "base_model", None), "running_state", None)
        self._state = _by_device(running() if running is not None else [])
        self._before: dict[torch.device, Tensor] = {}
        self._now: Step | None = None
        self._pending: Step | None = None
        self._loss = torch.zeros((), device=device)
        self._last_loss = torch.zeros((), device=device)
        self._stopped = torch.zeros((), device=device)

    def begin(self, number: int, num_items: Any) -> None:
        """Called before each micro-batch; at the first one of a step, remembers where it started."""
        if self._now is not None:
            return
        self._now = Step(number, num_items, _random_state(self._loss.device))
        self._loss = torch.zeros_like(self._loss)
        self._before = {device: _flat(tensors) for device, tensors in self._state.items()}

    def note(self, inputs: dict[str, Any], loss: Tensor) -> Tensor:
        """Take in a micro-batch; the loss to log, which is the last finite one where a step is left out."""
        assert self._now is not None
        self._now.batches.append(inputs)
        self._loss = self._loss + loss.detach().float()
        if not self._skip:
            return loss
        self._last_loss = torch.where(torch.isfinite(loss), loss, self._last_loss.to(loss.dtype))
        return self._last_loss.clone()

    def decide(self, norm: Any) -> None:
        """Called with the gradient's norm before the optimizer's step, which does nothing if the step is bad.

        Raises:
            NonFiniteError: The step, or the one before, is not finite, and is not to be left out.
        """
        assert self._now is not None
        step, self._now = self._now, None
        norm = norm.full_tensor() if hasattr(norm, "full_tensor") else norm
        norm = torch.as_tensor(norm, device=self._loss.device).detach().float().reshape(())
        finite = torch.isfinite(self._loss)
        if not self._scaled:
            finite = finite & torch.isfinite(norm)
        bad = (~finite).float()
        if self._several:
            dist.all_reduce(bad, dist.ReduceOp.MAX)
        if not self._skip:
            bad = self._stopped = torch.maximum(self._stopped, bad)
        step.values = torch.stack([self._loss, norm, bad])
        if self._waits:
            self._settle(step, before_optimizer=True)
            return
        if self._reads_flag:
            self._optimizer.found_inf = bad
        for device, tensors in self._state.items():
            kept = torch.where(bad.to(device) > 0, self._before[device], _flat(tensors))
            _put(tensors, kept)
        _start_copy(step)
        earlier, self._pending = self._pending, step
        if earlier is not None:
            self._settle(earlier)

    def settle(self) -> None:
        """Wait for the device and look at the last step; called before anything is logged or saved.

        Raises:
            NonFiniteError: It is not finite, and is not to be left out.
        """
        step, self._pending = self._pending, None
        if step is not None:
            self._settle(step)

    def close(self) -> None:
        """Leave the optimizer as it was."""
        vars(self._optimizer).pop("found_inf", None)

    def _settle(self, step: Step, before_optimizer: bool = False) -> None:
        assert step.values is not None
        if step.copied is not None:
            step.copied.synchronize()
        loss, norm, bad = step.values.tolist()
        if not bad:
            return
        if before_optimizer:
            for device, tensors in self._state.items():
                _put(tensors, self._before[device])
        what = f"the loss is {loss}" if not math.isfinite(loss) else f"the gradient's norm is {norm}"
        if self._several and math.isfinite(loss) and (math.isfinite(norm) or self._scaled):
            what = "the loss of another process is not finite"
        where = self._where(step)
        line = f"{what} at step {step.number}; {where}"
        if not self._skip:
            raise NonFiniteError(line)
        self.num_skipped += 1
        if self.num_skipped > self._max_skipped:
            raise NonFiniteError(
                f"{line}; {self._max_skipped} step(s) were left out before, which is max_skipped_steps"
            )
        self._tell(f"{line}; step left out ({self.num_skipped} of at most {self._max_skipped})")
        if before_optimizer:
            # An optimizer passes over parameters without a gradient, in its state too.
            for parameter in self._parameters:
                parameter.grad = None

    def _where(self, step: Step) -> str:
        if not self._is_clean:
            name = type(self._optimizer).__name__
            return f"{name} had stepped when it was found, so that its layer is unknown"
        gradients = [parameter.grad for parameter in self._parameters]
        before = {device: _flat(tensors) for device, tensors in self._state.items()}
        devices = [device for device in step.random if device is not None]
        try:
            with torch.random.fork_rng(devices=devices):
                _set_random_state(step.random)
                for parameter in self._parameters:
                    parameter.grad = None
                return self._explain(step)
        finally:
            for parameter, gradient in zip(self._parameters, gradients, strict=True):
                parameter.grad = gradient
            for device, tensors in self._state.items():
                _put(tensors, before[device])


def _by_device(tensors: list[Tensor]) -> dict[torch.device, list[Tensor]]:
    found: dict[torch.device, list[Tensor]] = {}
    for tensor in tensors:
        found.setdefault(tensor.device, []).append(tensor)
    return found


def _flat(tensors: list[Tensor]) -> Tensor:
    return torch.cat([tensor.detach().reshape(-1) for tensor in tensors])


@torch.no_grad()
def _put(tensors: list[Tensor], flat: Tensor) -> None:
    parts = flat.split([tensor.numel() for tensor in tensors])
    shaped = [part.view_as(tensor) for part, tensor in zip(parts, tensors, strict=True)]
    torch._foreach_copy_(tensors, shaped)  # pyright: ignore[reportPrivateImportUsage]  # as torch.optim uses it


def _start_copy(step: Step) -> None:
    assert step.values is not None
    if step.values.device.type != "cuda":
        return
    on_host = torch.empty(step.values.shape, pin_memory=True)
    on_host.copy_(step.values, non_blocking=True)
    step.values, step.copied = on_host, torch.cuda.Event()
    step.copied.record()


def _random_state(device: torch.device) -> dict[torch.device | None, Tensor]:
    states: dict[torch.device | None, Tensor] = {None: torch.get_rng_state()}
    if device.type == "cuda":
        states[device] = torch.cuda.get_rng_state(device)
    return states


def _set_random_state(states: dict[torch.device | None, Tensor]) -> None:
    for device, state in states.items():
        if device is None:
            torch.set_rng_state(state)
        else:
            torch.cuda.set_rng_state(state, device)
