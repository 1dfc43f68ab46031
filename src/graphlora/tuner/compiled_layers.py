"""`torch.compile` by decoder layer: once per shape, however many layers there are, where gradients are computed."""

from __future__ import annotations

import warnings
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from types import MethodType
from typing import Any

import torch
import transformers
from torch import Tensor, nn

from graphlora.errors import GraphLoraError

NUM_ITEMS = "num_items_in_batch"
# Versions of a layer's code that PyTorch may keep, after which it runs further ones uncompiled: per shape of a batch
# one for the first layer, whose input may want no gradient, and one for the others, each with a mask and without, for
# each of two kinds of attention.
VERSIONS_PER_SHAPE = 8
MAX_SHAPES = 32


def decoder_layers(model: nn.Module) -> nn.ModuleList:
    """The stack of decoder layers: the longest list of modules of one class.

    Raises:
        GraphLoraError: There is none.
    """
    stacks = [m for m in model.modules() if isinstance(m, nn.ModuleList) and len({type(x) for x in m}) == 1]
    if not stacks:
        raise GraphLoraError(f"{type(model).__name__} has no list of decoder layers")
    return max(stacks, key=lambda stack: (len(stack), sum(p.numel() for p in stack.parameters())))


def last_norms(model: nn.Module) -> list[nn.Module]:
    """Normalizations beside the stack of decoder layers: modules without parts whose parameters are vectors."""
    stack = decoder_layers(model)
    parent = next(m for m in model.modules() if any(child is stack for child in m.children()))
    alone = [m for m in parent.children() if not list(m.children())]
    return [m for m in alone if (own := list(m.parameters())) and all(p.dim() == 1 for p in own)]


def compile_layers(
    model: nn.Module, *, tell: Callable[[str], None] | None = None, **options: Any
) -> CompiledLayers:
    """Compile the decoder layers, the norm behind them and the loss of a model, in place, for training.

    All layers share what is compiled, so that a model of 80 layers is ready as soon as one of 8. Where no gradient is
    computed (validation, generation) nothing is compiled, nor are copies of the model. Each shape of a batch is
    compiled anew: give few. Forwards make no key-value cache unless they are asked to, of which each layer would want
    code of its own.

    Args:
        model: A transformers model, adapted or not, whose layers were not compiled yet.
        tell: Where the compiler fails on a forward, called with one line that says why, and training goes on
            uncompiled; left out: it raises what the compiler raised.
        options: Options of `torch.compile`, as `backend` or `mode`. Without a mode, PyTorch's compiler chooses kernels
            without timing them where the choice decides in which order numbers are added, so that another process
            gets the same bits; `options={"deterministic": False}` lets it time them.

    Returns:
        A handle whose `undo` makes the model as it was.

    Raises:
        GraphLoraError: The model has no list of decoder layers, or they are compiled already.
    """
    return CompiledLayers(model, tell, options)


class CompiledLayers:
    """What `compile_layers` did to a model; as a context manager it is undone at the end."""

    def __init__(self, model: nn.Module, tell: Callable[[str], None] | None, options: dict[str, Any]) -> None:
        """Compile, see `compile_layers`."""
        self.tell, self.failed = tell, False
        options = _repeatable(options)
        layers = [*decoder_layers(model), *last_norms(model)]
        if any(isinstance(vars(layer).get("forward"), _CompiledForward) for layer in layers):
            raise GraphLoraError("the model's layers are compiled already; undo that first")
        self._undo = ExitStack()
        self._undo.enter_context(_versions(VERSIONS_PER_SHAPE * MAX_SHAPES))
        for layer in layers:
            vars(layer)["forward"] = forward = _CompiledForward(self, layer, options)
            self._undo.callback(forward.remove)
        whole: Any = model
        base: Any = whole.get_base_model() if hasattr(whole, "get_base_model") else whole
        config: Any = base.config.get_text_config() if hasattr(base, "config") else None
        if getattr(config, "use_cache", False):
            config.use_cache = False
            self._undo.callback(setattr, config, "use_cache", True)
        loss = getattr(base, "loss_function", None)
        if loss is not None:
            base.loss_function = _CompiledLoss(self, loss, options)
            self._undo.callback(setattr, base, "loss_function", loss)

    def undo(self) -> None:
        """Make the model as it was."""
        self._undo.close()

    def __enter__(self) -> CompiledLayers:
        return self

    def __exit__(self, *_: object) -> None:
        self.undo()


class _Compiled:
    """A function that runs compiled where gradients are computed, and as it is elsewhere."""

    def __init__(self, owner: CompiledLayers, function: Callable[..., Any], options: dict[str, Any]) -> None:
        self._owner, self.__wrapped__ = owner, function
        self._compiled = torch.compile(function, dynamic=False, **options)

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        owner = self._owner
        if owner.failed or not torch.is_grad_enabled():
            return self.__wrapped__(*args, **kwargs)
        try:
            return self._compiled(*args, **kwargs)
        except compiler_errors() as error:
            if owner.tell is None:
                raise
            # A compiler fails before anything is computed, so that the call can be made anew.
            owner.failed = True
            owner.tell(f"torch.compile failed ({reason_of(error)}); going on without")
            return self.__wrapped__(*args, **kwargs)


class _CompiledForward(_Compiled):
    """The forward of a layer; a copy of the layer, in memory or on disk, has its own forward and is not compiled."""

    def __init__(self, owner: CompiledLayers, layer: nn.Module, options: dict[str, Any]) -> None:
        # Hooks of other libraries put something in place of the class's forward.
        self._layer, self._before = layer, vars(layer).get("forward")
        super().__init__(owner, layer.forward, options)

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        if _is_recomputed(self._layer):
            return self.__wrapped__(*args, **kwargs)
        return super().__call__(*args, **kwargs)

    def remove(self) -> None:
        """Leaves the layer with the forward that it had."""
        del vars(self._layer)["forward"]
        if self._before is not None:
            vars(self._layer)["forward"] = self._before

    def __reduce__(self) -> Any:
        return _forward_of, (self._layer, self._before)


class _CompiledLoss(_Compiled):
    """The loss of a model; a copy is the loss as it was."""

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        count = kwargs.get(NUM_ITEMS)
        if isinstance(count, int):  # for each other integer it would be compiled anew
            device = next((a.device for a in (*args, *kwargs.values()) if isinstance(a, Tensor)), None)
            kwargs = kwargs | {NUM_ITEMS: torch.tensor(count, device=device)}
        return super().__call__(*args, **kwargs)

    def __reduce__(self) -> Any:
        return _itself, (self.__wrapped__,)


def _forward_of(layer: nn.Module, before: Callable[..., Any] | None) -> Callable[..., Any]:
    return MethodType(type(layer).forward, layer) if before is None else before


def _itself(value: Any) -> Any:
    return value


def _is_recomputed(layer: nn.Module) -> bool:
    """Whether the layer's forward is called by activation checkpointing, a second time in backward.

    What is compiled for the second time may keep other tensors than what was compiled for the first, which
    checkpointing refuses. From 5.23 on transformers checkpoints within the forward, where it is compiled along.
    """
    if type(layer).__call__ is nn.Module.__call__:
        return False
    recomputed = bool(getattr(layer, "gradient_checkpointing", False)) and layer.training
    if recomputed:
        warnings.warn(
            f"transformers {transformers.__version__} checkpoints activations around the decoder layers, which stay "
            "uncompiled; transformers 5.23 does it within them",
            stacklevel=2,
        )
    return recomputed


def compiler_errors() -> tuple[type[Exception], ...]:
    """What `torch.compile` raises where it fails."""
    from torch._dynamo.exc import TorchDynamoException

    return (TorchDynamoException,)


def reason_of(error: Exception) -> str:
    """What a compiler's error says first, in one line."""
    lines = [line.strip() for line in str(error).splitlines() if line.strip()]
    if len(lines) > 1 and lines[0].endswith("raised:"):
        lines = lines[1:]
    return lines[0] if lines else type(error).__name__


def _repeatable(options: dict[str, Any]) -> dict[str, Any]:
    """Options of `torch.compile` with which PyTorch's own compiler, if it is the one, repeats what it chose.

    Its settings hold for the thread that makes them, and backwards are compiled in others: options go along. A mode is
    left alone: those that tune do it by timing.
    """
    if options.get("backend", "inductor") != "inductor" or options.get("mode"):
        return options
    return options | {"options": {"deterministic": True} | (options.get("options") or {})}


@contextmanager
def _versions(count: int) -> Iterator[None]:
    """Within it PyTorch keeps at least that many versions of a function's code."""
    import torch._dynamo  # takes seconds

    limit = torch._dynamo.config.cache_size_limit
    with torch._dynamo.config.patch(cache_size_limit=max(limit, count)):
        yield
