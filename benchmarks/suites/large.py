"""A Llama-3-70B-shaped model with 4-bit weights trains on one GPU: step time and peak memory."""

from __future__ import annotations

import copy
from typing import Any, cast

import torch
from peft import get_peft_model
from torch import nn
from transformers import AutoModelForCausalLM, PreTrainedModel

from benchmarks.candidates.models import ModelCandidate, graphlora_config, model_config, random_tokens
from benchmarks.context import Context
from benchmarks.failures import failures
from benchmarks.shapes import SHAPES, Shape
from graphlora.benchmark.memory import measure_memory
from graphlora.benchmark.timing import Call, Stopwatch, describe_error, interleave, release

STEPS = 3


def measure(context: Context) -> None:
    """Builds the model layer by layer in 4 bits, then takes training steps with gradient checkpointing."""
    p = context.case.params
    shape = SHAPES[p["shape"]]
    base = four_bit_model(shape, context.device, context.dtype)
    base.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": False})
    base.enable_input_require_grads()
    ids = random_tokens(shape, p["batch"], p["length"], context.device)
    if not context.may_run("triton"):
        return
    try:
        backend = context.stand_in("triton")
        adapted = cast(nn.Module, get_peft_model(cast(Any, base), graphlora_config(p["r"], backend))).train()
        trained = [q for q in adapted.parameters() if q.requires_grad]
        optimizer = torch.optim.AdamW(trained, lr=1e-4, fused=context.device.type == "cuda")
        candidate = ModelCandidate(adapted, trained, optimizer)
        losses: list[float] = []
        with measure_memory(context.device) as memory:
            result = interleave(
                {"triton": _step(candidate, ids, losses)}, context.device, warmup=1, iterations=STEPS
            )
    except failures() as error:
        context.fail("triton", describe_error(error))
        release(context.device)
        return
    context.add_timings(result, {"triton": {"losses": losses}})
    on_gpu = context.device.type == "cuda"
    # Above what was held before are the optimizer's state, gradients and activations; below it all weights.
    held = torch.cuda.memory_allocated() - memory.kept if on_gpu else 0
    context.add("triton", "peak_memory", float(held + memory.peak), "bytes", weights=held, above=memory.peak)
    if on_gpu:
        context.add("triton", "reserved", float(torch.cuda.max_memory_reserved()), "bytes")
    context.add("triton", "trained", float(sum(q.numel() for q in trained)), "parameters")


def _step(candidate: ModelCandidate, ids: torch.Tensor, losses: list[float]) -> Call:
    def call(watch: Stopwatch) -> None:
        losses.append(float(candidate.step(ids).detach()))
        watch.lap("step")

    return call


def four_bit_model(shape: Shape, device: torch.device, dtype: torch.dtype) -> PreTrainedModel:
    """The whole model with bitsandbytes nf4 weights; no more than one weight is ever held in full.

    All layers hold copies of the bytes of one random weight per projection.
    """
    import bitsandbytes as bnb

    config = model_config(shape, shape.num_layers)
    with torch.device("meta"):
        model = AutoModelForCausalLM.from_config(config, dtype=dtype)
    pattern: dict[tuple[int, int], Any] = {}
    for name, module in list(model.named_modules()):
        if not isinstance(module, nn.Linear) or name == "lm_head":
            continue
        size = (module.out_features, module.in_features)
        if size not in pattern:
            linear = bnb.nn.Linear4bit(
                size[1], size[0], bias=module.bias is not None, compute_dtype=dtype,
                compress_statistics=True, quant_type="nf4", device=device,
            )  # fmt: skip
            weight = torch.randn(size, device=device, dtype=dtype).mul_(0.02)
            linear.weight = bnb.nn.Params4bit(
                weight.cpu() if device.type == "cpu" else weight, requires_grad=False, quant_type="nf4"
            )
            if module.bias is not None:
                linear.bias = nn.Parameter(torch.zeros(size[0], dtype=dtype))
            pattern[size] = linear.to(device)
            del weight
            release(device)
        parent, _, child = name.rpartition(".")
        setattr(model.get_submodule(parent), child, copy.deepcopy(pattern[size]))
    _materialize_rest(model, device)
    model.requires_grad_(False)
    model.is_loaded_in_4bit = True
    return model.train()


def _materialize_rest(model: nn.Module, device: torch.device) -> None:
    """Embedding, head and norms at random on the device; position frequencies from the module's own rule."""
    for module in list(model.modules()):
        for name, parameter in list(module._parameters.items()):
            if parameter is not None and parameter.is_meta:
                real = torch.empty_like(parameter, device=device)
                nn.init.ones_(real) if real.dim() == 1 else nn.init.normal_(real, std=0.02)
                module._parameters[name] = nn.Parameter(real, requires_grad=False)
    for name, module in list(model.named_modules()):
        if any(buffer.is_meta for buffer in module._buffers.values() if buffer is not None):
            parent, _, child = name.rpartition(".")
            with torch.device(device):
                setattr(model.get_submodule(parent), child, type(module)(cast(Any, model).config))
