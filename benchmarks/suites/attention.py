"""The projections of one attention module with plain LoRA: forward, backward and both, for every way to run them.

`together` is how the library runs them: q, k and v, which read one tensor, by the call of the first; `apart` has each
compute its own.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, cast

import torch
from peft import LoraConfig, get_peft_model
from torch import Tensor, nn
from transformers import LlamaConfig
from transformers.models.llama.modeling_llama import LlamaMLP

from benchmarks.candidates.ffn import ALPHA, compiler_of, round_to_bfloat16
from benchmarks.context import Context
from benchmarks.gate import relative_error
from benchmarks.graphs import time_graphs
from benchmarks.shapes import SHAPES, Shape
from graphlora import GraphLoraConfig
from graphlora.benchmark.random_model import twin, wake
from graphlora.benchmark.timing import Call, Stopwatch
from graphlora.tuner.layer import GraphLoraLinear
from graphlora.tuner.shared_input import SharedInput

NAMES = ["q_proj", "k_proj", "v_proj", "o_proj"]
# Rounding of bfloat16, relative to the norm of the result.
_TOLERANCE = 2e-2


class Projections(nn.Module):
    """Four frozen projections, and an FFN block that is not run: adapters of this library want one."""

    def __init__(self, shape: Shape) -> None:
        super().__init__()
        d, kv = shape.hidden_size, shape.num_kv_heads * shape.head_size
        self.self_attn = nn.Module()
        for name, out in zip(NAMES, (d, kv, kv, d), strict=True):
            linear = nn.Linear(d, out, bias=False)
            nn.init.normal_(linear.weight, std=d**-0.5)
            setattr(self.self_attn, name, linear)
        self.mlp = LlamaMLP(LlamaConfig(hidden_size=d, intermediate_size=8, num_attention_heads=1))

    def forward(self, x: Tensor, mixed: Tensor) -> tuple[Tensor, ...]:
        """Queries, keys and values of x, and the output projection of what attention made of them."""
        query, key, value, out = (cast(nn.Module, getattr(self.self_attn, name)) for name in NAMES)
        return query(x), key(x), value(x), out(mixed)


class Candidate:
    """A way to run the projections.

    Args:
        model: what runs.
        x: input of q, k and v.
        mixed: input of the output projection.
        grads: gradients of the four outputs.
        compiled: compiler that `torch.compile` runs it by; None for none.
    """

    def __init__(
        self, model: nn.Module, x: Tensor, mixed: Tensor, grads: list[Tensor], compiled: str | None
    ) -> None:
        self.trained = [p for name, p in model.named_parameters() if p.requires_grad and "mlp" not in name]
        # Without the hooks of a whole model, which collect its auxiliary losses.
        self._run: Callable[..., tuple[Tensor, ...]] = model.forward
        if compiled is not None:
            self._run = cast(Any, torch.compile(model.forward, dynamic=False, backend=compiled))
        self._inputs, self._grads = (x, mixed), grads

    def forward(self) -> tuple[Tensor, ...]:
        """The four outputs."""
        return self._run(*self._inputs)

    def backward(self, outputs: tuple[Tensor, ...]) -> tuple[Tensor, ...]:
        """Gradients of both inputs and of what is trained."""
        return torch.autograd.grad(outputs, (*self._inputs, *self.trained), self._grads)

    def both(self) -> tuple[Tensor, ...]:
        """Outputs and gradients."""
        outputs = self.forward()
        return (*outputs, *self.backward(outputs))


def measure(context: Context) -> None:
    """Times the case's candidates once the two ways of the library agree."""
    p = context.case.params
    shape, device, dtype = SHAPES[p["shape"]], context.device, context.dtype
    torch.manual_seed(0)
    with torch.device(device):
        base = Projections(shape).to(dtype).requires_grad_(False)
        x, mixed = (torch.randn(p["tokens"], shape.hidden_size).to(dtype).requires_grad_() for _ in range(2))
        widths = [cast(nn.Linear, getattr(base.self_attn, name)).weight.shape[0] for name in NAMES]
        grads = [torch.randn(p["tokens"], width).to(dtype) for width in widths]

    def build(name: str) -> Candidate:
        way = name.removesuffix("_compiled")
        compiled = None if way == name else compiler_of(device)
        return Candidate(adapted(base, way, p["r"]), x, mixed, grads, compiled)

    made = context.build(p["candidates"], build)
    compare(made)
    calls = {name: _timed(candidate) for name, candidate in made.items()}
    context.add_timings(context.interleave(calls, in_a_row=2))
    if device.type == "cuda":
        time_graphs(context, {name: candidate.both for name, candidate in made.items()})


def adapted(base: Projections, way: str, r: int) -> nn.Module:
    """The projections with the adapter of a candidate, all on the same frozen weights.

    Raises:
        KeyError: an unknown name.
    """
    model = twin(base)
    if way == "frozen":
        return model
    if way.startswith("peft_"):
        config = LoraConfig(r=r, lora_alpha=int(ALPHA), target_modules=NAMES)
        model = get_peft_model(model, config, autocast_adapter_dtype=way == "peft_float32")
    elif way in ("together", "apart"):
        config = GraphLoraConfig(
            r=r, lora_alpha=ALPHA, target_modules=["mlp"], attention_target_modules=NAMES
        )
        model = get_peft_model(model, config)
    else:
        raise KeyError(way)
    wake(model, scale=0.05)
    with torch.no_grad():
        for seed, (name, parameter) in enumerate(model.named_parameters()):
            if "lora_A" in name and parameter.requires_grad:
                generator = torch.Generator(parameter.device).manual_seed(seed)
                parameter.normal_(std=parameter.shape[-1] ** -0.5, generator=generator)
    round_to_bfloat16(model)
    for layer in model.modules() if way == "apart" else ():
        if isinstance(layer, GraphLoraLinear):
            layer.shared_input = SharedInput([layer])
    # What PEFT wraps around the call of a whole model belongs to none of the candidates.
    return cast(nn.Module, model.train().get_base_model())


def compare(made: dict[str, Candidate]) -> None:
    """Candidates of one adapter give the same outputs and gradients.

    Raises:
        AssertionError: where they do not.
    """
    names = [name for name in made if name.startswith(("together", "apart"))]
    results = {name: made[name].both() for name in names}
    for name in names[1:]:
        for value, want in zip(results[name], results[names[0]], strict=True):
            if not relative_error(value, want) < _TOLERANCE:
                raise AssertionError(f"{name} is not {names[0]}")


def _timed(candidate: Candidate) -> Call:
    def call(watch: Stopwatch) -> None:
        outputs = candidate.forward()
        watch.lap("forward")
        candidate.backward(outputs)
        watch.lap("backward")

    return call
