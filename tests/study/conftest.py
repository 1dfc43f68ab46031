"""A tiny model, a task of colors with a test split, and a study of seconds."""

from pathlib import Path

import pytest
import yaml
from reliability.tiny import choice_rows, write_rows

GRAPHLORA = {"num_experts": 4, "router_hidden_size": 16}


@pytest.fixture(scope="session")
def colors(tmp_path_factory) -> Path:
    """Rows with a train and a test split; validation is a part of train."""
    rows = choice_rows(50)
    for position, row in enumerate(rows):
        row["split"] = "test" if position % 5 == 0 else "train"
    return write_rows(tmp_path_factory.mktemp("data") / "colors.jsonl", rows)


@pytest.fixture(scope="session")
def study_values(tiny_model, colors) -> dict:
    """A study of two methods and two seeds; each run takes about a second."""
    return {
        "study": "tiny",
        "models": [str(tiny_model)],
        "tasks": [str(colors)],
        "seeds": [0, 1],
        "policy": {
            "r": 2,
            "lora_alpha": 4,
            "lora_dropout": 0.1,
            "dtype": "float32",
            "learning_rate": 1e-2,
            "max_steps": 6,
            "eval_steps": 2,
            "logging_steps": 1,
            "per_device_train_batch_size": 4,
            "training_args": {"use_cpu": True},
        },
        "variants": {"lora": {"method": "lora"}, "graphlora": GRAPHLORA},
    }


@pytest.fixture
def study_file(study_values, tmp_path) -> Path:
    path = tmp_path / "study.yaml"
    path.write_text(yaml.safe_dump(study_values, sort_keys=False))
    return path
