"""Tiny random models, batches and adapters that are no longer zero."""

from collections.abc import Callable, Iterator

import peft
import pytest
import torch
from torch._dynamo.utils import counters
from transformers import LlamaConfig, LlamaForCausalLM

from graphlora import GraphLoraConfig

SIZES = {
    "vocab_size": 64,
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 64,
    "pad_token_id": 0,
    "bos_token_id": 1,
    "eos_token_id": 2,
}


@pytest.fixture
def fresh_compiler() -> Iterator[None]:
    """Nothing is compiled or counted yet, and nothing stays."""
    torch._dynamo.reset()
    counters.clear()
    yield
    torch._dynamo.reset()


@pytest.fixture
def make_llama() -> Callable[..., LlamaForCausalLM]:
    """Builds a tiny Llama; the same weights every time."""

    def make(seed: int = 0, **changes: object) -> LlamaForCausalLM:
        torch.manual_seed(seed)
        return LlamaForCausalLM(LlamaConfig(**{**SIZES, **changes})).eval()

    return make


@pytest.fixture
def make_config() -> Callable[..., GraphLoraConfig]:
    """Builds a small configuration for causal language models."""

    def make(**changes: object) -> GraphLoraConfig:
        small = {
            "task_type": "CAUSAL_LM",
            "num_experts": 4,
            "top_k": 2,
            "r": 2,
            "lora_alpha": 4,
            "router_hidden_size": 8,
        }
        return GraphLoraConfig(**{**small, **changes})

    return make


@pytest.fixture
def make_adapted(make_llama, make_config) -> Callable[..., peft.PeftModel]:
    """Builds a tiny Llama with an adapter that already does something."""

    def make(seed: int = 0, fill: bool = True, **changes: object) -> peft.PeftModel:
        model = peft.get_peft_model(make_llama(seed), make_config(**changes))
        if fill:
            fill_adapter(model)
        return model.eval()

    return make


@torch.no_grad()
def fill_adapter(model: torch.nn.Module, adapter_name: str = "default", seed: int = 1) -> None:
    """Gives every B of an adapter random values, so that it changes the outputs."""
    generator = torch.Generator().manual_seed(seed)
    for name, parameter in model.named_parameters():
        if name.endswith(f"{adapter_name}.lora_B"):
            parameter.copy_(0.3 * torch.randn(parameter.shape, generator=generator))


@pytest.fixture(name="fill_adapter")
def fill_adapter_fixture() -> Callable[..., None]:
    """The function `fill_adapter`."""
    return fill_adapter


@pytest.fixture
def tokens() -> torch.Tensor:
    """`[3, 10]` token ids without special tokens."""
    return torch.randint(3, 64, (3, 10), generator=torch.Generator().manual_seed(3))
