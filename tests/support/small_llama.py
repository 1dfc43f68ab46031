"""A Llama that is large enough for memory and time to be predicted, and adapters for it."""

from peft import LoraConfig
from transformers import LlamaConfig

from graphlora import GraphLoraConfig

LLAMA = LlamaConfig(
    vocab_size=256,
    hidden_size=128,
    intermediate_size=352,
    num_hidden_layers=5,
    num_attention_heads=4,
    num_key_value_heads=2,
)
ADAPTERS = {
    "lora": LoraConfig(r=8, target_modules="all-linear", task_type="CAUSAL_LM"),
    "graphlora": GraphLoraConfig(task_type="CAUSAL_LM"),
}


def with_vocabulary(size: int) -> LlamaConfig:
    """The same Llama with so many tokens."""
    return LlamaConfig(**{**LLAMA.to_dict(), "vocab_size": size})
