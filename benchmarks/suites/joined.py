"""One FFN block with the weights of gate and up joined in memory, beside the same with the two apart."""

from benchmarks.suites.ffn import measure

__all__ = ["measure"]
