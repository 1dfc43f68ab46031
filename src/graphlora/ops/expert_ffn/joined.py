"""Gate and up as one matrix: where their weights lie behind each other in memory, one product does the work of two."""

from __future__ import annotations

from torch import Tensor

from graphlora.ops.operations import is_traced


def joined(gate: Tensor, up: Tensor) -> Tensor | None:
    """Both weights as one matrix `[2 f, d]` in their own memory; None where up does not follow gate there.

    None too where something traces: compilers take each input's memory for its own.

    Args:
        gate: `[f, d]`.
        up: `[f, d]`.
    """
    if is_traced(gate) or is_traced(up) or gate.shape != up.shape or gate.dtype != up.dtype:
        return None
    if not gate.is_contiguous() or up.stride() != gate.stride():
        return None
    if gate.untyped_storage().data_ptr() != up.untyped_storage().data_ptr():
        return None
    if up.storage_offset() != gate.storage_offset() + gate.numel():
        return None
    f, d = gate.shape
    return gate.detach().as_strided((2 * f, d), (d, 1))
