"""Arithmetic of sizes on the host.

Triton's own `cdiv` and `next_power_of_2` also work inside kernels, and pay for that with 3 µs a call on the host: at
some ninety calls per layer, a step of a small model waited for them.
"""

from __future__ import annotations


def ceil_div(size: int, part: int) -> int:
    """How many parts of `part` cover `size`; both positive, or `size` zero."""
    return (size + part - 1) // part


def next_power_of_2(n: int) -> int:
    """The smallest power of two that is at least n; n is at least 1."""
    return 1 << (n - 1).bit_length()
