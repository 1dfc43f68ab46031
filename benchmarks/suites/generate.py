"""Text generation by `model.generate` as a user runs it: with its default cache, and compiled behind a static one."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from peft import get_peft_model
from torch import Tensor
from torch._dynamo import config as dynamo_config
from torch._dynamo.utils import counters
from transformers import GenerationConfig

from benchmarks.candidates.models import graphlora_config, lora_config, model_config, random_tokens
from benchmarks.context import Context
from benchmarks.failures import NotHere
from benchmarks.shapes import SHAPES
from graphlora.benchmark.random_model import random_model, twin, wake
from graphlora.benchmark.timing import Stopwatch
from graphlora.evaluation.generation import StaticGenerator

COMPILED = "_compiled"
CANDIDATES = tuple(f"{name}{mode}" for mode in ("", COMPILED) for name in ("frozen", "triton", "peft"))
RANK = 8
# Calls of a compiled candidate before the timed rounds and their own warm-up: the first compiles, the second records.
_FIRST_CALLS = 2
# Compiled versions of one function that PyTorch keeps; far more than the candidates need.
_VERSIONS = 64


@dataclass
class Generation:
    """A candidate's whole call of `generate`.

    Attributes:
        generate: does it; returns prompts and answers, `[batch, prompt + new]`.
        graphs: what the calls so far have compiled.
        skips: how many of them could not be recorded as CUDA graphs.
    """

    generate: Callable[[], Tensor]
    graphs: int = 0
    skips: int = 0

    def __call__(self, watch: Stopwatch | None = None) -> None:
        """One call; has no phases."""
        del watch
        graphs, skips = _compiled()
        self.generate()
        now = _compiled()
        self.graphs += now[0] - graphs
        self.skips += now[1] - skips


def measure(context: Context) -> None:
    """Times calls that all make the same number of tokens, greedily."""
    p = context.case.params
    shape = SHAPES[p["shape"]]
    base = random_model(model_config(shape, p["layers"]), context.device, context.dtype)
    ids = random_tokens(shape, p["batch"], p["prompt"], context.device)

    def make(name: str) -> Generation:
        if name.endswith(COMPILED) and context.device.type != "cuda":
            raise NotHere("transformers compiles generation on a GPU")
        generation = generation_of(name, base, ids, settings(p["new"]))
        for _ in range(_FIRST_CALLS if name.endswith(COMPILED) else 0):
            generation()
        return generation

    with compilations_kept():
        made = context.build(CANDIDATES, make)
        result = context.interleave(made, warmup=4, iterations=12)
    context.add_timings(result)
    for name, timings in result.timings.items():
        rate = p["batch"] * p["new"] / timings["full"].median * 1e3
        context.add(name, "tokens_per_second", rate, "tokens/s")
        if name.endswith(COMPILED):
            context.add(name, "graphs", made[name].graphs, "graphs")
            context.add(name, "unrecorded", made[name].skips, "graphs")


def generation_of(name: str, base: Any, ids: Tensor, config: GenerationConfig) -> Generation:
    """A candidate on a twin of the base, so that no two share what is compiled.

    Args:
        name: `"frozen"`, `"peft"` or a path of GraphLoRA, with `COMPILED` behind it for a static cache.
        base: the frozen model.
        ids: prompts without padding, `[batch, prompt]`.
        config: see `settings`.
    """
    model = twin(base)
    # Both ways of a candidate get the same adapter.
    torch.manual_seed(0)
    kind = name.removesuffix(COMPILED)
    if kind == "peft":
        model = get_peft_model(model, lora_config(RANK), autocast_adapter_dtype=False)
    elif kind != "frozen":
        model = get_peft_model(model, graphlora_config(RANK, kind))
    wake(model)
    model.eval()
    generate = StaticGenerator(model) if name.endswith(COMPILED) else model.generate
    mask = torch.ones_like(ids)
    return Generation(lambda: generate(input_ids=ids, generation_config=config, attention_mask=mask))


def settings(new_tokens: int) -> GenerationConfig:
    """Greedy, exactly so many tokens, with a cache."""
    return GenerationConfig(
        max_new_tokens=new_tokens, min_new_tokens=new_tokens, do_sample=False, use_cache=True, pad_token_id=0
    )


@contextmanager
def compilations_kept() -> Iterator[None]:
    """Within it no model's compiled code makes another's give way; nothing compiled comes in or stays.

    The models share their classes' code, of which PyTorch compiles a limited number of versions, by default 8, and
    runs all further ones uncompiled. Beside what an earlier case compiled, another batch size would be compiled as
    one that varies.
    """
    torch.compiler.reset()
    try:
        with dynamo_config.patch(recompile_limit=_VERSIONS):
            yield
    finally:
        torch.compiler.reset()


def _compiled() -> tuple[int, int]:
    """Graphs that this process has compiled, and those not recorded as CUDA graphs."""
    return counters["stats"]["unique_graphs"], counters["inductor"]["cudagraph_skips"]
