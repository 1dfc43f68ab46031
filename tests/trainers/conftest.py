"""The tiny model that these tests share, on one thread so that sums are the same in every run."""

import sys
from pathlib import Path

import pytest
import torch

sys.path.insert(0, str(Path(__file__).parents[1] / "support"))

# PEFT 0.21 and TRL 1.16 use names of transformers that its version 5.23 calls by others.
RENAMED = (
    "ignore:`is_gradient_checkpointing` is deprecated:FutureWarning",
    "ignore:`gradient_checkpointing(_[a-z]+)?` is deprecated:FutureWarning",
)


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    for item in items:
        if Path(__file__).parent in item.path.parents:
            for renamed in RENAMED:
                item.add_marker(pytest.mark.filterwarnings(renamed))


@pytest.fixture(scope="session", autouse=True)
def _one_thread():
    torch.set_num_threads(1)
