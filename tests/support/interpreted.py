"""Where tests run the kernels: on the GPU, without one on CPU tensors in Triton's interpreter."""

import pytest
import torch

from graphlora.ops.backend import has_triton, interprets_triton

INTERPRETED = pytest.mark.skipif(
    not has_triton() or not interprets_triton(),
    reason="kernels run on CPU tensors in Triton's interpreter, which is off beside a GPU",
)
KERNELS = pytest.mark.skipif(not has_triton(), reason="needs Triton")
KERNEL_DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
