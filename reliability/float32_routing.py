"""Routers and losses under autocast: the same bits as without it.

Routers get tokens in half precision, once under autocast and once outside of it. The losses of a whole training forward
under autocast are computed a second time from the same routing outside of it. Whatever autocast touched would differ,
because it rounds to 8 or 11 bits.
"""

from __future__ import annotations

import argparse
import warnings
from typing import Any
from unittest import mock

import torch
from peft import PeftModel, get_peft_model
from torch import Tensor
from transformers import LlamaForCausalLM

import graphlora.tuner.model
from graphlora import GraphLoraConfig
from reliability.record import write_record
from reliability.tiny import two_blocks

PROMISE = "Routers and losses compute in float32 under autocast (bfloat16 and float16): no bit differs from without it."
PRESETS = ("graphlora", "paper", "released", "mixlora", "mola", "dynmole", "ld_mole", "loramoe", "hydralora")
DTYPES = (torch.bfloat16, torch.float16)
HIDDEN, VOCABULARY = 32, 64


def make_model(preset: str, seed: int) -> PeftModel:
    """A tiny Llama with experts that differ."""
    torch.manual_seed(seed)
    config = two_blocks()
    adapter = GraphLoraConfig(task_type="CAUSAL_LM", preset=preset, r=2)
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", ".*expert graphs hold twins")
        model = get_peft_model(LlamaForCausalLM(config), adapter)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if "lora_B" in name:
                parameter.normal_(std=0.2)
    assert isinstance(model, PeftModel)
    return model.train()


def routers(model: PeftModel) -> list[Any]:
    """The routers of all blocks."""
    return [module.router("default") for module in model.modules() if hasattr(module, "graphlora_router")]


def router_differences(preset: str, seed: int, dtype: torch.dtype) -> int:
    """Values of a router's decision that autocast changes, or that are not float32."""
    router = routers(make_model(preset, seed))[0]
    hidden = router.weight.shape[1] if hasattr(router, "weight") else HIDDEN
    x = torch.randn(40, hidden, generator=torch.Generator().manual_seed(seed)).to(dtype)
    plain = router.route(x, "torch", 2)
    with torch.autocast("cpu", dtype=dtype):
        cast = router.route(x, "torch", 2)
    names = ("router_logits", "router_probs", "top_k_weights", "top_k_index")
    pairs = [(getattr(plain, name), getattr(cast, name)) for name in names]
    wrong_dtype = sum(one.dtype != torch.float32 for pair in pairs[:3] for one in pair)
    return wrong_dtype + sum(int((one != other).sum()) for one, other in pairs)


def loss_difference(preset: str, seed: int, dtype: torch.dtype) -> float:
    """How far autocast moves the auxiliary losses and the loads of one training forward, at most."""
    model = make_model(preset, seed)
    ids = torch.randint(1, VOCABULARY, (3, 17), generator=torch.Generator().manual_seed(seed))
    mask = torch.ones_like(ids)
    mask[1, 9:] = 0
    original = graphlora.tuner.model.auxiliary_loss
    gaps: list[float] = []

    def twice(*args: Any) -> Tensor:
        tuner: Any = model.base_model
        state = tuner.running_state()
        before = [tensor.clone() for tensor in state]
        with torch.autocast("cpu", enabled=False):
            plain, loads = original(*args), [tensor.clone() for tensor in state]
        for tensor, value in zip(state, before, strict=True):
            tensor.copy_(value)
        cast = original(*args)
        assert cast.dtype == plain.dtype == torch.float32
        gaps.append(float((cast - plain).detach().abs()))
        gaps.extend(float((a - b).abs().max()) for a, b in zip(state, loads, strict=True))
        return cast

    with (
        mock.patch.object(graphlora.tuner.model, "auxiliary_loss", twice),
        torch.autocast("cpu", dtype=dtype),
    ):
        model(input_ids=ids, attention_mask=mask, labels=ids)
    return max(gaps)


def main(count: int) -> None:
    """Check all presets and dtypes with `count` seeds; record."""
    wrong, largest = 0, 0.0
    for preset in PRESETS:
        for dtype in DTYPES:
            for seed in range(count):
                wrong += router_differences(preset, seed, dtype)
                largest = max(largest, loss_difference(preset, seed, dtype))
        print(f"{preset}: {wrong} values differ, losses at most {largest:g} apart", flush=True)
    cases = len(PRESETS) * len(DTYPES) * count
    if wrong or largest:
        raise SystemExit("the promise does not hold")
    write_record(
        "float32_routing",
        PROMISE,
        "tests/reliability/test_float32_routing.py",
        f"{cases} models under autocast ({len(PRESETS)} presets, bfloat16 and float16): 0 values differ",
        {"models": cases, "presets": list(PRESETS), "values_that_differ": wrong, "largest_loss_gap": largest},
    )


if __name__ == "__main__":
    parser = argparse.ArgumentParser(prog="python -m reliability.float32_routing", description=__doc__)
    parser.add_argument("--count", type=int, default=20, help="seeds per preset and dtype (default: 20)")
    main(parser.parse_args().count)
