"""Data and recipes of runs that take seconds."""

from pathlib import Path

import pytest
from reliability.tiny import COLORS, THINGS, write_rows


@pytest.fixture(scope="session")
def texts_file(tmp_path_factory) -> Path:
    rows = [
        {"prompt": f"What color is the {thing} {number}?", "completion": f" {COLORS[number % 6]}"}
        for number, thing in enumerate(THINGS * 4)
    ]
    return write_rows(tmp_path_factory.mktemp("data") / "texts.jsonl", rows)


GRAPHLORA = {"num_experts": 4, "top_k": 2, "router_hidden_size": 16}


@pytest.fixture
def tiny_recipe(tiny_model, choices_file, tmp_path) -> dict:
    """Options of a run of seconds, in float32 with dropout, so that the random state matters."""
    return {
        "model": str(tiny_model),
        "task": str(choices_file),
        "output_dir": str(tmp_path / "out"),
        "method": "lora",
        "dtype": "float32",
        "r": 4,
        "lora_alpha": 8,
        "lora_dropout": 0.1,
        "learning_rate": 1e-2,
        "per_device_train_batch_size": 4,
        "max_steps": 6,
        "eval_steps": 3,
        "logging_steps": 1,
        "training_args": {"use_cpu": True, "disable_tqdm": True},
    }


@pytest.fixture(params=["lora", "graphlora"])
def any_recipe(request, tiny_recipe) -> dict:
    """The same run with plain LoRA and with GraphLoRA."""
    return tiny_recipe | {"method": request.param} | (GRAPHLORA if request.param == "graphlora" else {})
