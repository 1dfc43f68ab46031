"""The architectures that are measured. Imports no torch."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True)
class Shape:
    """Sizes of a model with SwiGLU blocks.

    Attributes:
        name: how cases call it.
        model_type: transformers' name of the architecture.
        hidden_size: d.
        intermediate_size: f.
        num_layers: decoder layers.
        num_heads: attention heads.
        num_kv_heads: key and value heads.
        vocab_size: vocabulary.
        tied: whether the embedding is also the head.
    """

    name: str
    model_type: str
    hidden_size: int
    intermediate_size: int
    num_layers: int
    num_heads: int
    num_kv_heads: int
    vocab_size: int
    tied: bool = False

    @property
    def head_size(self) -> int:
        """Width of one attention head."""
        return self.hidden_size // self.num_heads

    def layer_matmul(self) -> int:
        """Weights of one layer's matrix products."""
        kv = self.num_kv_heads * self.head_size
        attention = 2 * self.hidden_size * (self.hidden_size + kv)
        return attention + 3 * self.hidden_size * self.intermediate_size

    def num_matmul(self, num_layers: int | None = None) -> int:
        """Weights of all matrix products, the head included and the embedding not."""
        layers = self.num_layers if num_layers is None else num_layers
        return layers * self.layer_matmul() + self.hidden_size * self.vocab_size


LLAMA3_8B = Shape("llama3-8b", "llama", 4096, 14336, 32, 32, 8, 128256)
QWEN2_7B = Shape("qwen2-7b", "qwen2", 3584, 18944, 28, 28, 4, 152064)
LLAMA3_70B = Shape("llama3-70b", "llama", 8192, 28672, 80, 64, 8, 128256)
LLAMA3_405B = Shape("llama3-405b", "llama", 16384, 53248, 126, 128, 8, 128256)
SMOLLM2 = Shape("smollm2-135m", "llama", 576, 1536, 30, 9, 3, 49152, tied=True)
SMOLLM2_360M = Shape("smollm2-360m", "llama", 960, 2560, 32, 15, 5, 49152, tied=True)
SMOLLM2_1B7 = Shape("smollm2-1.7b", "llama", 2048, 8192, 24, 32, 32, 49152, tied=True)
MEDIUM = Shape("d2048-f5632", "llama", 2048, 5632, 22, 32, 4, 32000)
TINY = Shape("tiny", "llama", 32, 64, 2, 4, 2, 64)

SHAPES = {
    shape.name: shape
    for shape in (
        LLAMA3_8B,
        QWEN2_7B,
        LLAMA3_70B,
        LLAMA3_405B,
        SMOLLM2,
        SMOLLM2_360M,
        SMOLLM2_1B7,
        MEDIUM,
        TINY,
    )
}
EIGHT_BILLION = (LLAMA3_8B, QWEN2_7B)
