"""Training steps that are recorded once per input shape and then replayed as one CUDA graph.

A small model's step on a GPU is thousands of kernel launches, each of which takes the host longer to ask for than the
device to run. A CUDA graph asks for all of them at once. What a graph needs is kept here: inputs and gradients that
stay at their addresses, warm-up runs that leave no trace, and a bound on the number of shapes.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from typing import Any, Protocol

import torch
from torch import Tensor, nn

from graphlora.errors import GraphLoraError

MAX_GRAPHS = 32
NUM_WARM_UPS = 2

Step = Callable[[dict[str, Any]], Tensor]
Key = tuple[Any, ...]


class Replayable(Protocol):
    """A recorded step: `replay` runs it on what its inputs hold now and leaves the loss in `loss`."""

    loss: Tensor

    def replay(self) -> None:
        """Run the step again."""


class CudaGraph:
    """A step recorded as a CUDA graph.

    Random numbers (dropout) continue from the state of the device's generator at each replay.
    """

    def __init__(self, step: Callable[[], Tensor], device: torch.device, pool: Any) -> None:
        """Record `step`, which must not make the host wait for the device, with its memory in `pool`."""
        del device
        self._graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(self._graph, pool=pool, capture_error_mode="thread_local"):
            self.loss = step()

    def replay(self) -> None:
        """Run the recorded kernels."""
        self._graph.replay()


class Rerun:
    """Stand-in for a CUDA graph where there is none: runs the step's Python again on the same buffers."""

    def __init__(self, step: Callable[[], Tensor], device: torch.device, pool: Any) -> None:
        """Remember `step`."""
        del pool
        self._step, self.loss = step, torch.zeros((), device=device)

    def replay(self) -> None:
        """Run the step."""
        self.loss = self._step()


class _Recorded:
    """One shape: its input buffers, its recorded step, and the parameters that the step gives gradients."""

    def __init__(self, inputs: dict[str, Any], trained: list[nn.Parameter], step: Replayable) -> None:
        self.inputs, self.trained, self.step = inputs, trained, step


class CapturedSteps:
    """Runs forward and backward of micro-batches by replaying one recorded step per input shape.

    Gradients add up in buffers that stay; where `zero_grad` has detached them they are zeroed and attached again, so
    that accumulation and clipping see what they see in an eager step. Parameters that a step gives no gradient keep
    `None`. What a forward changes besides gradients (buffers of modules, the random state) is put back after warm-up
    and recording: the first step of a shape counts once.
    """

    def __init__(
        self,
        model: nn.Module,
        *,
        device: torch.device,
        max_graphs: int = MAX_GRAPHS,
        must_record: bool = True,
        tell: Callable[[str], None] | None = None,
    ) -> None:
        """Set up without recording anything.

        Args:
            model: Model in training mode; its parameters to train, kept in `parameters`, are those that require
                gradients now.
            device: Where it is. Without CUDA, steps are run again in Python (`Rerun`).
            max_graphs: Shapes to record; further ones run eagerly.
            must_record: Raise where a step cannot be recorded, else go on eagerly.
            tell: Called with one line for each shape that is recorded, and once when there are too many.
        """
        self.model, self.device, self.max_graphs = model, device, max_graphs
        self.parameters = [parameter for parameter in model.parameters() if parameter.requires_grad]
        # The graphs share their memory: one replays at a time, and of its results the loss alone is kept.
        self._pool = torch.cuda.graph_pool_handle() if device.type == "cuda" else None
        # One stream for all warm-ups: memory that a stream has freed goes to that stream alone.
        self._side_stream = torch.cuda.Stream(device) if device.type == "cuda" else None
        self._gradients: dict[nn.Parameter, Tensor] = {}
        self._recorded: dict[Key, _Recorded] = {}
        self._must_record, self._full = must_record, False
        self._tell = tell if tell is not None else lambda _: None
        self._begin_step = _begin_step_of(model)

    @property
    def num_graphs(self) -> int:
        """Shapes that were recorded."""
        return len(self._recorded)

    def __call__(self, step: Step, inputs: dict[str, Any], variant: Key = ()) -> Tensor:
        """Forward and backward of one micro-batch.

        Args:
            step: Takes inputs, adds gradients to the parameters, and returns the loss (scalar, detached). It may
                depend on nothing but its inputs, the model, and `variant`.
            inputs: Tensors by name; `None` values stay as they are.
            variant: Whatever else decides what `step` does.

        Returns:
            The loss, a copy that later steps do not change.

        Raises:
            GraphLoraError: The step cannot be recorded.
        """
        self._begin_step()
        inputs = {name: _on(value, self.device) for name, value in inputs.items()}
        key = (variant, tuple((name, _shape(value)) for name, value in inputs.items()))
        recorded = self._recorded.get(key)
        if recorded is None:
            recorded = self._record(step, inputs) if len(self._recorded) < self.max_graphs else None
            if recorded is None:
                return self._eager(step, inputs)
            self._recorded[key] = recorded
        for name, value in inputs.items():
            if isinstance(value, Tensor):
                recorded.inputs[name].copy_(value, non_blocking=True)
        self._attach(recorded.trained)
        recorded.step.replay()
        return recorded.step.loss.clone()

    def zero_grad(self, set_to_none: bool = True) -> None:
        """As `nn.Module.zero_grad`, without looking through all modules for the parameters that are trained."""
        del set_to_none
        drop_gradients(self.parameters)

    def _eager(self, step: Step, inputs: dict[str, Any]) -> Tensor:
        if not self._full:
            self._full = True
            self._tell(f"more than {self.max_graphs} input shapes; the other ones run kernel by kernel")
        return step(inputs)

    def _record(self, step: Step, inputs: dict[str, Any]) -> _Recorded | None:
        """A recorded step; `None` where recording failed and need not succeed, then none is tried again."""
        try:
            recorded = self._recording(step, inputs)
        except torch.OutOfMemoryError:
            raise
        except RuntimeError as error:
            reason = str(error).strip().split("\n")[0]
            if self._must_record:
                raise GraphLoraError(
                    f"the training step cannot be recorded as a CUDA graph ({reason}); set step_mode to eager"
                ) from error
            self._tell(f"the training step cannot be recorded as a CUDA graph ({reason}); going on without")
            self.max_graphs, self._full = 0, True
            return None
        ids = recorded.inputs.get("input_ids")
        shape = " x ".join(str(size) for size in ids.shape) if isinstance(ids, Tensor) else "one shape of"
        self._tell(f"recorded the training step for {shape} tokens ({len(self._recorded) + 1} so far)")
        return recorded

    def _recording(self, step: Step, inputs: dict[str, Any]) -> _Recorded:
        static = {name: v.clone() if isinstance(v, Tensor) else v for name, v in inputs.items()}
        with self._without_a_trace():
            warm_up = _as_recorded(static)
            for _ in range(NUM_WARM_UPS):
                self.zero_grad()
                self._on_side_stream(lambda: step(warm_up))
            trained = [parameter for parameter in self.parameters if parameter.grad is not None]
            self.zero_grad()
            self._attach(trained)
            if self._side_stream is not None:
                torch.cuda.empty_cache()  # what the warm-ups took is for the recording to take
            graph = CudaGraph if self.device.type == "cuda" else Rerun
            return _Recorded(static, trained, graph(lambda: step(static), self.device, self._pool))

    @contextmanager
    def _without_a_trace(self) -> Iterator[None]:
        """Puts back gradients, buffers of modules and the random state."""
        gradients = [parameter.grad for parameter in self.parameters]
        # The gradients' buffers may hold what earlier micro-batches of this step have added.
        held = {p: buffer.clone() for p, buffer in self._gradients.items() if p.grad is buffer}
        buffers = [(buffer, buffer.clone()) for buffer in self.model.buffers()]
        devices = [self.device] if self.device.type == "cuda" else []
        try:
            with torch.random.fork_rng(devices=devices):
                yield
        finally:
            with torch.no_grad():
                for buffer, before in buffers:
                    buffer.copy_(before)
                for parameter, before in held.items():
                    self._gradients[parameter].copy_(before)
            for parameter, gradient in zip(self.parameters, gradients, strict=True):
                parameter.grad = gradient

    def _on_side_stream(self, run: Callable[[], Tensor]) -> None:
        stream = self._side_stream
        if stream is None:
            run()
            return
        stream.wait_stream(torch.cuda.current_stream(self.device))
        with torch.cuda.stream(stream):
            run()
        torch.cuda.current_stream(self.device).wait_stream(stream)

    def _attach(self, trained: list[nn.Parameter]) -> None:
        """Give the parameters their gradient buffers: zeroed where they had none, with its content where another."""
        fresh = []
        for parameter in trained:
            buffer = self._gradients.get(parameter)
            if buffer is None:
                buffer = self._gradients[parameter] = torch.zeros_like(parameter)
            if parameter.grad is buffer:
                continue
            if parameter.grad is None:
                fresh.append(buffer)
            else:
                buffer.copy_(parameter.grad)
            parameter.grad = buffer
        if fresh:
            torch._foreach_zero_(fresh)  # pyright: ignore[reportPrivateImportUsage]  # as torch.optim uses it


def _begin_step_of(model: nn.Module) -> Callable[[], None]:
    """What an adapter does on the host once per optimizer step, outside of the recorded part."""
    begin = getattr(getattr(model, "base_model", None), "begin_step", None)
    return begin if begin is not None else lambda: None


def _as_recorded(inputs: dict[str, Any]) -> dict[str, Any]:
    """Inputs with which a step does on the host what it does while it is recorded.

    transformers leaves the mask of a batch without padding away where it may look at it, which it may not while it is
    recorded; what compilers make of the two is different, and they cannot make it then.
    """
    mask = inputs.get("attention_mask")
    if not isinstance(mask, Tensor) or mask.dim() != 2:
        return inputs
    padded = mask.clone()
    padded[0, -1] = 0
    return inputs | {"attention_mask": padded}


def drop_gradients(parameters: Iterable[nn.Parameter]) -> None:
    """Leaves parameters without a gradient."""
    for parameter in parameters:
        parameter.grad = None


def _on(value: Any, device: torch.device) -> Any:
    return value.to(device, non_blocking=True) if isinstance(value, Tensor) else value


def _shape(value: Any) -> Any:
    return (tuple(value.shape), value.dtype) if isinstance(value, Tensor) else value
