"""One decoder layer, and what surrounds the layers, measured for a kind of adapter."""

from __future__ import annotations

import copy
import gc
from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Any, cast

import torch
from peft import PeftConfig, get_peft_model
from torch import Tensor, nn
from transformers import PretrainedConfig

from graphlora.benchmark.memory import measure_memory
from graphlora.benchmark.random_model import bypassed, random_model, with_layers
from graphlora.benchmark.timing import FULL, Call, Stopwatch, interleave, release
from graphlora.tuner.auxiliary import auxiliary_loss
from graphlora.tuner.compiled_layers import compile_layers, decoder_layers
from graphlora.tuner.config import GraphLoraConfig
from graphlora.tuner.model import GraphLoraModel
from graphlora.tuner.tuner_layer import RoutedLayer

# A layer alone starts with an idle device and cold caches, unlike one in a step; so it is timed several times on end,
# where what that keeps for backward is small.
_REPEATS, _REPEATED_BYTES = 4, 2**30


@dataclass(frozen=True)
class Setting:
    """What is asked about.

    Attributes:
        config: architecture.
        batch_size: rows per step.
        length: tokens per row.
        device: where it runs.
        dtype: of the frozen weights.
        gradient_checkpointing: whether layers recompute their activations.
        iterations: timed iterations.
        compiler: what compiles layers and loss, by `torch.compile`'s name (`inductor`); None: they run as they are.
    """

    config: PretrainedConfig
    batch_size: int
    length: int
    device: torch.device
    dtype: torch.dtype
    gradient_checkpointing: bool = False
    iterations: int = 10
    compiler: str | None = None


@dataclass(frozen=True)
class Parts:
    """What was measured of one candidate; times in milliseconds, memory in bytes.

    Attributes:
        forward: of one decoder layer.
        backward: of one decoder layer.
        rest: forward and backward of embedding, head and loss.
        losses: forward and backward of what joins the routing of all layers to the loss.
        optimizer: one step for the adapters of all layers.
        layer_weights: frozen weights of one layer.
        rest_weights: frozen weights outside of the layers.
        layer_trained: adapter weights of one layer.
        num_trained: adapter parameters of one layer.
        activations: what one layer keeps for backward.
        recomputation: the most that forward and backward of one layer hold at a time, above their input.
        rest_peak: the most that embedding, head and loss hold at a time.
    """

    forward: float
    backward: float
    rest: float
    losses: float
    optimizer: float
    layer_weights: int
    rest_weights: int
    layer_trained: int
    num_trained: int
    activations: int
    recomputation: int
    rest_peak: int


def measure_parts(setting: Setting, adapter: PeftConfig | None) -> Parts:
    """Measures a model of one layer with the adapter (None: the frozen model), in pieces.

    The optimizer is timed on as many adapter weights as the whole model has.
    """
    num_layers = int(setting.config.get_text_config().num_hidden_layers)
    model = one_layer_model(setting, adapter)
    layers = decoder_layers(model)
    trained = [p for p in model.parameters() if p.requires_grad]
    ids = random_tokens(setting)
    memory = _memory_of(setting, model, ids)
    repeats = max(1, min(_REPEATS, _REPEATED_BYTES // max(1, memory.activations)))
    once = _layer_alone(layers[0], lambda: loss_of(model, ids))
    run_layer = _layer_alone(layers[0], lambda: loss_of(model, ids), repeats)

    def run_rest(watch: Stopwatch) -> None:
        with bypassed(layers):
            _backward(loss_of(model, ids), trained)
        watch.lap("rest")

    calls = {"layer": lambda w: _ignore(run_layer(w)), "rest": run_rest}
    if (join := _joining(setting, model, once, num_layers)) is not None:
        calls["losses"] = join
    timings = interleave(calls, setting.device, warmup=3, iterations=setting.iterations).timings
    full = {name: phases[FULL] for name, phases in timings.items()}
    release(setting.device)
    inner = [p for p in layers[0].parameters() if p.requires_grad]
    return replace(
        memory,
        forward=timings["layer"]["forward"].median / repeats,
        backward=timings["layer"]["backward"].median / repeats,
        rest=full["rest"].median,
        losses=full["losses"].median if "losses" in full else 0.0,
        optimizer=_optimizer_time(setting, inner, num_layers),
    )


def memory_parts(setting: Setting, adapter: PeftConfig | None) -> Parts:
    """As `measure_parts`, memory alone: times are zero, and nothing runs more than three times."""
    return _memory_of(setting, one_layer_model(setting, adapter), random_tokens(setting))


def _memory_of(setting: Setting, model: nn.Module, ids: Tensor) -> Parts:
    layers = decoder_layers(model)
    layer = layers[0]
    trained = [p for p in model.parameters() if p.requires_grad]
    inner = [p for p in layer.parameters() if p.requires_grad]
    run_layer = _layer_alone(layer, lambda: loss_of(model, ids))
    if setting.compiler is not None:  # the compiler's own memory is not the layer's
        run_layer(Stopwatch(setting.device))
        with bypassed(layers):
            _backward(loss_of(model, ids), trained)
    activations, recomputation = _layer_memory(setting, run_layer)
    with measure_memory(setting.device) as memory, bypassed(layers):
        _backward(loss_of(model, ids), trained)
    weights = sum(_size(p) for p in layer.parameters() if not p.requires_grad)
    return Parts(
        forward=0.0,
        backward=0.0,
        rest=0.0,
        losses=0.0,
        optimizer=0.0,
        layer_weights=weights,
        rest_weights=sum(_size(p) for p in model.parameters() if not p.requires_grad) - weights,
        layer_trained=sum(_size(p) for p in inner),
        num_trained=sum(p.numel() for p in inner),
        activations=activations,
        recomputation=recomputation,
        rest_peak=memory.peak,
    )


def one_layer_model(setting: Setting, adapter: PeftConfig | None) -> nn.Module:
    """The architecture with a single layer and random weights, adapted."""
    return adapted_model(setting, with_layers(setting.config, 1), adapter)


def adapted_model(setting: Setting, config: PretrainedConfig, adapter: PeftConfig | None) -> nn.Module:
    """A model with random weights and the adapter, ready to train, its steps compiled where that is asked for."""
    model: Any = random_model(config, setting.device, setting.dtype)
    model.config.use_cache = False
    if adapter is not None:
        # A copy, because PEFT writes the names that it finds in one model into the config.
        model = get_peft_model(model, copy.deepcopy(adapter)).train()
    if setting.compiler is not None:
        compile_layers(model, backend=setting.compiler)
    return cast(nn.Module, model)


def random_tokens(setting: Setting) -> Tensor:
    """`[batch, length]` random token ids."""
    vocabulary = int(setting.config.get_text_config().vocab_size)
    generator = torch.Generator(setting.device).manual_seed(0)
    shape = (setting.batch_size, setting.length)
    return torch.randint(0, vocabulary, shape, device=setting.device, generator=generator)


def loss_of(model: Any, ids: Tensor) -> Tensor:
    """Loss of a batch; the gradient runs back to the embedding's output, as with an adapter in the first layer."""
    embedded = model.get_input_embeddings()(ids).detach().requires_grad_()
    return model(inputs_embeds=embedded, labels=ids, use_cache=False).loss


def _layer_alone(
    layer: nn.Module, run_model: Callable[[], Tensor], repeats: int = 1
) -> Callable[[Stopwatch | None], Tensor]:
    """Forward of a layer on what the model gives it, `repeats` times on end; a stopwatch times also backward."""
    args, kwargs = _arguments_of(layer, run_model)
    hidden = args[0] if args else kwargs["hidden_states"]
    inner = [p for p in layer.parameters() if p.requires_grad]

    def run(watch: Stopwatch | None) -> Tensor:
        leaf = hidden.detach().requires_grad_()
        out = leaf
        for _ in range(repeats):
            result = layer(out, *args[1:], **{k: v for k, v in kwargs.items() if k != "hidden_states"})
            out = result[0] if isinstance(result, tuple) else result
        if watch is not None:
            watch.lap("forward")
            torch.autograd.grad(out, [leaf, *inner], torch.ones_like(out), allow_unused=True)
            watch.lap("backward")
        return out

    return run


def _joining(
    setting: Setting, model: Any, run_layer: Callable[[Stopwatch | None], Tensor], num_layers: int
) -> Call | None:
    """Forward and backward of the auxiliary losses of as many layers as the whole model has; None without any.

    They are computed once for all layers, so the time of one layer's says little about theirs.
    """
    tuner = getattr(model, "base_model", None)
    if not isinstance(tuner, GraphLoraModel):
        return None
    name = tuner.active_adapters[0]
    config = cast(GraphLoraConfig, tuner.peft_config[name])
    tuner.recorder.open([m for m in tuner.modules() if isinstance(m, RoutedLayer)], training=True)
    run_layer(None)
    record = tuner.recorder.close()
    if record is None or not record.entries:
        return None
    masks: dict[str, Tensor | None] = {layer.side: None for layer, _ in record.entries}
    # The sums over a group of blocks tell them apart by their routing, and the loads by their state.
    record.entries = [
        (_with_own_state(layer), replace(routing))
        for _ in range(num_layers)
        for layer, routing in record.entries
    ]
    ends: list[Tensor] = []
    for layer, routing in record.entries:
        ends += [
            t for t in (routing.router_logits, routing.router_probs, routing.top_k_weights) if t.requires_grad
        ]
        ends += [p for p in layer.coordination(name).parameters() if p.requires_grad]

    def join(watch: Stopwatch) -> None:
        loss = auxiliary_loss(record, masks, name, config, setting.batch_size)
        if loss.requires_grad:
            torch.autograd.grad(loss, ends, retain_graph=True, allow_unused=True)
        watch.lap("losses")

    return join


def _with_own_state(layer: RoutedLayer) -> RoutedLayer:
    """The layer as another one of the model, which shares nothing that the losses of a forward change."""
    other = copy.copy(layer)
    other._modules = dict(layer._modules)
    other.graphlora_router = copy.deepcopy(layer.graphlora_router)
    other.graphlora_coordination = copy.deepcopy(layer.graphlora_coordination)
    return other


def _backward(loss: Tensor, trained: list[nn.Parameter]) -> None:
    loss.backward()
    for parameter in trained:
        parameter.grad = None


def _arguments_of(layer: nn.Module, run: Callable[[], Tensor]) -> tuple[tuple[Any, ...], dict[str, Any]]:
    """What the model passes to its layer."""
    seen: list[tuple[tuple[Any, ...], dict[str, Any]]] = []

    def look(_: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        seen.append((args, dict(kwargs)))

    hook = layer.register_forward_pre_hook(look, with_kwargs=True)
    try:
        with torch.no_grad():
            run()
    finally:
        hook.remove()
    return seen[0]


def _layer_memory(setting: Setting, run_layer: Callable[[Stopwatch | None], Tensor]) -> tuple[int, int]:
    """Bytes that a layer keeps for backward, and the most that it holds at a time.

    Collecting garbage first matters: a forward may leave cycles that hold tensors for a while.
    """
    with measure_memory(setting.device) as kept:
        out = run_layer(None)
        gc.collect()
    del out
    with measure_memory(setting.device) as most:
        run_layer(Stopwatch(setting.device))
    return kept.kept, most.peak


def _optimizer_time(setting: Setting, one_layer: list[nn.Parameter], num_layers: int) -> float:
    """AdamW on the adapters of all layers."""
    if not one_layer:
        return 0.0
    copies = [nn.Parameter(p.detach().clone()) for _ in range(num_layers) for p in one_layer]
    for parameter in copies:
        parameter.grad = torch.full_like(parameter, 1e-3)
    optimizer = torch.optim.AdamW(copies, fused=setting.device.type == "cuda")

    def step(watch: Stopwatch) -> None:
        optimizer.step()
        watch.lap("optimizer")

    timings = interleave({"": step}, setting.device, warmup=2, iterations=setting.iterations).timings
    return timings[""][FULL].median


def _size(parameter: Tensor) -> int:
    return parameter.numel() * parameter.element_size()


def _ignore(value: object) -> None:
    del value
