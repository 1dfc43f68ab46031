"""What one launch does for up to three weights side by side: which of them a program works for."""

from __future__ import annotations

import triton
import triton.language as tl


@triton.jit
def own_rows(first, second, third, rows1, rows2, rows3, blocks1, blocks2):
    """Of three weights side by side: the one that a program's block lies in, its rows, block in it and first column."""
    block = tl.program_id(0)
    weight, num_rows, row_block, column = first, rows1, block, 0
    if block >= blocks1 + blocks2:
        weight, num_rows, row_block, column = third, rows3, block - blocks1 - blocks2, rows1 + rows2
    elif block >= blocks1:
        weight, num_rows, row_block, column = second, rows2, block - blocks1, rows1
    return weight, num_rows, row_block, column


@triton.jit
def own_output(
    base1, base2, base3, weight1, weight2, weight3, out1, out2, out3, width1, width2, width3, blocks1, blocks2
):  # fmt: skip
    """Of three outputs: the one that a program's block lies in, what belongs to it, its number and the block in it."""
    block = tl.program_id(0)
    base, weight, out, width, which, own_block = base1, weight1, out1, width1, 0, block
    if block >= blocks1 + blocks2:
        base, weight, out, width, which = base3, weight3, out3, width3, 2
        own_block = block - blocks1 - blocks2
    elif block >= blocks1:
        base, weight, out, width, which = base2, weight2, out2, width2, 1
        own_block = block - blocks1
    return base, weight, out, width, which, own_block
