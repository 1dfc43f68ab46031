"""Tests of the kernels on CPU tensors."""

import pytest

from graphlora.ops.backend import has_triton, interprets_triton

INTERPRETED = pytest.mark.skipif(
    not has_triton() or not interprets_triton(),
    reason="kernels run on CPU tensors in Triton's interpreter, which is off beside a GPU",
)
