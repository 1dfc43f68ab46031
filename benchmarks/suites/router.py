"""Row 7: the graph router with softmax, top-k and renormalization, forward and backward."""

from __future__ import annotations

from typing import Any, cast

import torch
from peft import get_peft_model
from torch import Tensor

from benchmarks.candidates.ffn import ALPHA, NUM_EXPERTS, TOP_K, Block, FfnBench
from benchmarks.context import Context
from benchmarks.graphs import time_graphs
from benchmarks.shapes import SHAPES
from graphlora import GraphLoraConfig
from graphlora.benchmark.random_model import twin
from graphlora.benchmark.timing import Call, Stopwatch
from graphlora.router import CenteredRouter, Routing, select_experts
from graphlora.tuner.layer import GraphLoraLayer

CANDIDATES = ("triton", "torch", "eager")


def measure(context: Context) -> None:
    """Times routing of random tokens, with gradients to the tokens and to the router's weights."""
    p = context.case.params
    shape = SHAPES[p["shape"]]
    bench = FfnBench(shape, 8, p["tokens"], "balanced", context.device, context.dtype)
    config = GraphLoraConfig(
        r=8, lora_alpha=ALPHA, num_experts=NUM_EXPERTS, top_k=TOP_K, router_hidden_size=p["width"],
        target_modules=["mlp"], attention_target_modules=[],
        **({"router_self_term": p["self_term"]} if "self_term" in p else {}),
    )  # fmt: skip
    model = get_peft_model(cast(Any, Block(twin(bench.mlp))), config).train()
    layer = next(m for m in model.modules() if isinstance(m, GraphLoraLayer))
    router = layer.router("default")
    weights = [parameter for parameter in router.parameters() if parameter.requires_grad]

    d_probs = torch.randn(p["tokens"], NUM_EXPERTS, device=context.device)
    d_weights = torch.randn(p["tokens"], TOP_K, device=context.device)

    def backward(routing: Routing) -> object:
        outputs = (routing.router_probs, routing.top_k_weights)
        return torch.autograd.grad(outputs, (bench.x, *weights), (d_probs, d_weights), allow_unused=True)

    def make(backend: str) -> Call:
        def call(watch: Stopwatch) -> None:
            routing = route(router, bench.x, backend)
            watch.lap("forward")
            backward(routing)
            watch.lap("backward")

        return call

    calls = context.build(CANDIDATES, make)
    context.add_timings(context.interleave(calls))
    if context.device.type == "cuda":
        # Called from Python, launches take longer than the kernels, which in a whole step run behind the big products.
        time_graphs(
            context, {name: lambda name=name: backward(route(router, bench.x, name)) for name in calls}
        )


def route(router: CenteredRouter, x: Tensor, backend: str) -> Routing:
    """Routing by the router's own choice of path where it has one."""
    if hasattr(router, "route"):
        return cast(Any, router).route(x, backend, TOP_K, True)
    return select_experts(router(x, backend), TOP_K)
