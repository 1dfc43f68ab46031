"""Properties are tried on the same examples every time, however slow the machine is."""

import pytest
import torch
from hypothesis import settings

settings.register_profile("paper", deadline=None, derandomize=True, max_examples=50)
settings.load_profile("paper")


@pytest.fixture(scope="session", autouse=True)
def _one_thread():
    torch.set_num_threads(1)
