"""What tests of kernels share."""

import pytest
import torch


@pytest.fixture
def poisoned_memory(monkeypatch):
    """Every new buffer starts as NaN (or a large integer), so that what is read before it is written shows."""
    torch.use_deterministic_algorithms(True, warn_only=True)
    monkeypatch.setattr(torch.utils.deterministic, "fill_uninitialized_memory", True)
    yield
    torch.use_deterministic_algorithms(False)
