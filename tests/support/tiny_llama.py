"""A tiny random Llama with a GraphLoRA adapter, small batches, and the auxiliary losses written out in plain loops."""

import math

import torch
from peft import PeftModel, get_peft_model
from torch import Tensor
from transformers import LlamaConfig, LlamaForCausalLM

from graphlora import GraphLoraConfig

VOCAB, PAD = 32, 0
POISSON, NORMAL = 0.3, 0.7


def make_base(seed: int = 0, **overrides) -> LlamaForCausalLM:
    torch.manual_seed(seed)
    sizes = {
        "vocab_size": VOCAB,
        "hidden_size": 16,
        "intermediate_size": 32,
        "num_hidden_layers": 2,
        "num_attention_heads": 2,
        "num_key_value_heads": 1,
        "max_position_embeddings": 128,
        "initializer_range": 0.2,
        "pad_token_id": PAD,
        "bos_token_id": None,
        "eos_token_id": None,
    }
    return LlamaForCausalLM(LlamaConfig(**{**sizes, **overrides}))


def adapter_config(**overrides) -> GraphLoraConfig:
    fields = {
        "task_type": "CAUSAL_LM",
        "r": 2,
        "num_experts": 4,
        "top_k": 2,
        "router_hidden_size": 8,
        "edge_density": 0.5,
        "load_window": "ema",
        "router_poisson_loss_coef": POISSON,
        "router_normal_loss_coef": NORMAL,
    }
    return GraphLoraConfig(**{**fields, **overrides})


def make_model(seed: int = 0, base: torch.nn.Module | None = None, **overrides) -> PeftModel:
    """An adapted model in training mode whose experts differ (B is not zero)."""
    model = get_peft_model(make_base(seed) if base is None else base, adapter_config(**overrides))
    wake(model, seed)
    return model.train()


def wake(model: torch.nn.Module, seed: int = 0) -> None:
    """Fills every B, which starts at zero."""
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if "lora_B" in name:
                parameter.copy_(0.2 * torch.randn(parameter.shape, generator=generator))


def make_batch(
    lengths: list[int], width: int | None = None, side: str = "right", seed: int = 0
) -> dict[str, Tensor]:
    """Rows of random tokens with the given lengths, padded to `width` on one side.

    Labels are on all real tokens but a row's first one, which nothing real predicts.
    """
    width = width or max(lengths)
    generator = torch.Generator().manual_seed(seed)
    ids = torch.full((len(lengths), width), PAD)
    mask = torch.zeros(len(lengths), width, dtype=torch.long)
    for row, length in enumerate(lengths):
        tokens = torch.randint(1, VOCAB, (length,), generator=generator)
        where = slice(0, length) if side == "right" else slice(width - length, width)
        ids[row, where] = tokens
        mask[row, where] = 1
    unpredicted = mask.cumsum(1) < 2
    return {
        "input_ids": ids,
        "attention_mask": mask,
        "labels": ids.masked_fill((mask == 0) | unpredicted, -100),
    }


def layers(model: torch.nn.Module) -> list[torch.nn.Module]:
    return [m for m in model.modules() if type(m).__name__ == "GraphLoraLayer"]


def adapter_state(model: torch.nn.Module) -> dict[str, Tensor]:
    """Copies of all parameters and buffers of the adapter."""
    return {name: t.detach().clone() for name, t in model.state_dict().items() if "graphlora_" in name}


def loads(model: torch.nn.Module, adapter: str = "default") -> Tensor:
    """`[blocks, experts]`."""
    return torch.stack([layer.coordination(adapter).cumulative_weights.clone() for layer in layers(model)])


def gradients(model: torch.nn.Module) -> dict[str, Tensor]:
    return {n: p.grad.clone() for n, p in model.named_parameters() if p.grad is not None}


def assert_same(one: dict[str, Tensor], other: dict[str, Tensor], tolerance: float) -> None:
    """Equal names and values, up to `tolerance` relative to the largest entry of each tensor (at least 1)."""
    assert one.keys() == other.keys()
    for name, value in one.items():
        scale = max(1.0, float(value.abs().max())) if value.numel() else 1.0
        gap = float((value - other[name]).abs().max()) if value.numel() else 0.0
        assert gap <= tolerance * scale, f"{name}: {gap:.3g} apart, largest entry {scale:.3g}"


def largest_gap(one: dict[str, Tensor], other: dict[str, Tensor]) -> float:
    """Norm of the difference of all tensors, relative to the norm of `one`."""
    flat = [torch.cat([d[name].double().flatten() for name in one]) for d in (one, other)]
    return float((flat[0] - flat[1]).norm() / flat[0].norm())


def poisson_by_hand(logits: Tensor, rate: Tensor) -> Tensor:
    """Equations 6 and 7 for one token: logits `[experts]`."""
    probs = logits.softmax(0).sort(descending=True).values
    target = [rate**i * torch.exp(-rate) / math.factorial(i) for i in range(1, len(probs) + 1)]
    total = sum(target)
    return sum(t / total * torch.log(t / total / p) for t, p in zip(target, probs, strict=True))


def load_by_hand(logits: Tensor, keep: Tensor, top_k: int) -> Tensor:
    """Renormalized weight of the selected experts, summed over the tokens that count: logits `[tokens, experts]`."""
    load = [torch.zeros(()) for _ in range(logits.shape[1])]
    for row, counts in zip(logits, keep, strict=True):
        if counts:
            probs = row.softmax(0)
            chosen = sorted(range(len(probs)), key=lambda e: (-probs[e].item(), e))[:top_k]
            share = sum(probs[e] for e in chosen)
            for e in chosen:
                load[e] = load[e] + probs[e] / share
    return torch.stack(load)


def normal_by_hand(load: Tensor, sigma: Tensor) -> Tensor:
    """Equations 8 and 9 for one block, an unused expert's share floored at 1e-8: load `[experts]`."""
    n = len(load)
    target = [torch.exp(-((i - n / 2) ** 2) / (2 * sigma**2)) for i in range(1, n + 1)]
    target = torch.stack(target).sort(descending=True).values
    target = target / target.sum()
    shares = (load / load.sum()).sort(descending=True).values.clamp_min(1e-8)
    return (target * torch.log(target / shares)).sum()


def aux_by_hand(
    model: torch.nn.Module, router_logits: tuple[Tensor, ...], keep: Tensor, history: Tensor
) -> Tensor:
    """`aux_loss` of one forward: keep `[tokens]`, history `[blocks, experts]` before that forward."""
    config = model.peft_config["default"]
    poisson, normal = [], []
    for layer, logits, before in zip(layers(model), router_logits, history, strict=True):
        state = layer.coordination("default")
        tokens = [poisson_by_hand(row, state.poisson_rate) for row, k in zip(logits, keep, strict=True) if k]
        poisson.append(torch.stack(tokens).mean())
        load = load_by_hand(logits, keep, config.top_k)
        windows = {
            "ema": config.load_decay * before + (1 - config.load_decay) * load,
            "cumulative": before + load,
            "batch": load,
        }
        normal.append(normal_by_hand(windows[config.load_window], state.normal_scale))
    poisson_loss, normal_loss = torch.stack(poisson).mean(), torch.stack(normal).mean()
    return config.router_poisson_loss_coef * poisson_loss + config.router_normal_loss_coef * normal_loss
