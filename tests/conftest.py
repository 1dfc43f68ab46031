"""What all tests share: no network, and a reason beside every test that this machine cannot run."""

import os
from pathlib import Path

os.environ["HF_HUB_OFFLINE"] = "1"
os.environ["HF_DATASETS_OFFLINE"] = "1"
os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
os.environ.setdefault("MPLBACKEND", "Agg")

import pytest
import torch

if not torch.cuda.is_available():
    # Triton's kernels run in its interpreter, on CPU tensors. It must know before a kernel is defined.
    os.environ.setdefault("TRITON_INTERPRET", "1")

REAL_MODEL = Path(__file__).parents[1] / "models" / "SmolLM2-135M-Instruct"


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    reasons = {}
    if not (REAL_MODEL / "model.safetensors").is_file():
        reasons["real_model"] = f"no {REAL_MODEL.name} under models/: `make model` fetches it"
    if not torch.cuda.is_available():
        reasons["gpu"] = "no CUDA device"
    for item in items:
        for marker, reason in reasons.items():
            if item.get_closest_marker(marker):
                item.add_marker(pytest.mark.skip(reason=reason))


@pytest.fixture(scope="session", autouse=True)
def _one_thread():
    """Sums in the same order in every run."""
    torch.set_num_threads(1)


@pytest.fixture(autouse=True)
def _limit_of_the_compiler():
    """How many versions of a function's code PyTorch keeps is the process's, and compiled layers raise it."""
    import torch._dynamo

    with torch._dynamo.config.patch(cache_size_limit=torch._dynamo.config.cache_size_limit):
        yield


@pytest.fixture(scope="session")
def tiny_model(tmp_path_factory) -> Path:
    """Directory of a random Llama of two layers, with a tokenizer."""
    from reliability.tiny import make_model

    return make_model(tmp_path_factory.mktemp("models") / "tiny")


@pytest.fixture(scope="session")
def other_model(tmp_path_factory) -> Path:
    """Likewise, of another width."""
    from reliability.tiny import make_model

    return make_model(tmp_path_factory.mktemp("models") / "wider", hidden_size=48)


@pytest.fixture(scope="session")
def choices_file(tmp_path_factory) -> Path:
    """Multiple-choice rows for `tiny_model`."""
    from reliability.tiny import choice_rows, write_rows

    return write_rows(tmp_path_factory.mktemp("data") / "colors.jsonl", choice_rows(40))


@pytest.fixture(scope="session")
def real_model() -> Path:
    """Directory of SmolLM2-135M-Instruct, for tests marked `real_model`."""
    return REAL_MODEL
