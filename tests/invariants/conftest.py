"""The tiny model that these tests share, on one thread so that sums are the same in every run."""

import sys
from pathlib import Path

import pytest
import torch

sys.path.insert(0, str(Path(__file__).parents[1] / "support"))


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """PEFT 0.21 asks transformers for a property that transformers 5.23 calls by another name."""
    mark = pytest.mark.filterwarnings("ignore:`is_gradient_checkpointing` is deprecated:FutureWarning")
    for item in items:
        if Path(__file__).parent in item.path.parents:
            item.add_marker(mark)


@pytest.fixture(scope="session", autouse=True)
def _one_thread():
    torch.set_num_threads(1)
