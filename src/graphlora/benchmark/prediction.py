"""From the parts of a model to its training step: time, tokens per second, peak memory; and the step itself."""

from __future__ import annotations

from dataclasses import asdict, dataclass
from typing import Any

import torch
from peft import PeftConfig

from graphlora.benchmark.layer import Parts, Setting, adapted_model, loss_of, measure_parts, random_tokens
from graphlora.benchmark.memory import measure_memory
from graphlora.benchmark.timing import Stopwatch, interleave, release

# Bytes of AdamW's state and of the gradient per byte of a trained weight.
_OPTIMIZER_SHARE, _GRADIENT_SHARE = 2, 1


@dataclass(frozen=True)
class Prediction:
    """A training step of the whole model; times in milliseconds, memory in bytes.

    Attributes:
        step: forward, loss, backward and optimizer.
        tokens_per_second: all tokens of the batch.
        trained: adapter parameters.
        weights: frozen weights.
        adapters: adapter weights and the optimizer's state.
        activations: what all layers keep for backward.
        peak: the most at any time.
        parts: what it was put together from.
    """

    step: float
    tokens_per_second: float
    trained: int
    weights: int
    adapters: int
    activations: int
    peak: int
    parts: Parts

    def as_dict(self) -> dict[str, Any]:
        """As JSON values."""
        return asdict(self)


def predict(setting: Setting, adapter: PeftConfig | None) -> Prediction:
    """Measures the parts and puts the step together.

    With gradient checkpointing a layer keeps its input alone and runs forward twice.
    """
    parts = measure_parts(setting, adapter)
    release(setting.device)
    return put_together(setting, parts)


def put_together(setting: Setting, parts: Parts) -> Prediction:
    """The whole step from its parts."""
    text = setting.config.get_text_config()
    layers = int(text.num_hidden_layers)
    again = parts.forward if setting.gradient_checkpointing else 0.0
    per_layer = parts.forward + parts.backward + again
    step = layers * per_layer + parts.losses + parts.rest + parts.optimizer
    tokens = setting.batch_size * setting.length
    input_bytes = tokens * int(text.hidden_size) * torch.finfo(setting.dtype).bits // 8
    memory = peak_bytes(
        parts, layers=layers, input_bytes=input_bytes, checkpointing=setting.gradient_checkpointing
    )
    return Prediction(
        step=step,
        tokens_per_second=1e3 * tokens / step,
        trained=layers * parts.num_trained,
        weights=memory.weights,
        adapters=memory.adapters,
        activations=memory.activations,
        peak=memory.peak,
        parts=parts,
    )


@dataclass(frozen=True)
class PeakBytes:
    """Memory of a training step in bytes; see `Prediction`."""

    weights: int
    adapters: int
    activations: int
    peak: int


def peak_bytes(parts: Parts, *, layers: int, input_bytes: int, checkpointing: bool) -> PeakBytes:
    """Memory of a whole step from that of its parts.

    Args:
        parts: What was measured.
        layers: Decoder layers.
        input_bytes: Input of a layer, which is all that it keeps with gradient checkpointing.
        checkpointing: Whether layers recompute their activations.
    """
    kept = input_bytes if checkpointing else parts.activations
    weights = layers * parts.layer_weights + parts.rest_weights
    trained = layers * parts.layer_trained
    adapters = trained * (1 + _OPTIMIZER_SHARE)
    # Either the head is at its peak with all activations held, or the last layer goes backward, or at the end all
    # gradients are there.
    in_layer = max(0, parts.recomputation - (0 if checkpointing else kept))
    peak = max(
        layers * kept + max(parts.rest_peak, in_layer),
        kept + in_layer + _GRADIENT_SHARE * trained,
    )
    return PeakBytes(weights, adapters, layers * kept, weights + adapters + peak)


@dataclass(frozen=True)
class Measured:
    """A training step of the whole model as it ran.

    Attributes:
        step: milliseconds.
        peak: bytes.
    """

    step: float
    peak: int


def measure_whole(setting: Setting, adapter: PeftConfig | None) -> Measured:
    """Runs the whole model with random weights and measures its step."""
    model: Any = adapted_model(setting, setting.config, adapter)
    if setting.gradient_checkpointing:
        model.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": False})
    trained = [p for p in model.parameters() if p.requires_grad]
    optimizer = torch.optim.AdamW(trained, fused=setting.device.type == "cuda") if trained else None
    ids = random_tokens(setting)

    def step(watch: Stopwatch) -> None:
        loss_of(model, ids).backward()
        if optimizer is not None:
            optimizer.step()
            optimizer.zero_grad(set_to_none=True)
        watch.lap("step")

    timings = interleave({"": step}, setting.device, warmup=3, iterations=setting.iterations).timings
    release(setting.device)
    with measure_memory(setting.device) as memory:
        step(Stopwatch(setting.device))
    held = {p.data_ptr(): p.numel() * p.element_size() for p in model.parameters()}
    if optimizer is not None:
        for state in optimizer.state.values():
            held |= {t.data_ptr(): t.numel() * t.element_size() for t in state.values()}
    return Measured(timings[""]["step"].median, sum(held.values()) + memory.peak)
