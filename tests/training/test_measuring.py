"""Memory: what a run took, and one line of remedies where it is not enough."""

import pytest
import torch

from graphlora.errors import GraphLoraError
from graphlora.training import Recipe, train
from graphlora.training.measuring import explained_memory, memory_text, peak_memory, peak_reserved
from graphlora.training.trainer import AdapterTrainer


def recipe(**options) -> Recipe:
    return Recipe.from_dict({"model": "m", "task": "quiz", "output_dir": "out"} | options)


def message(options: dict) -> str:
    with pytest.raises(GraphLoraError) as raised, explained_memory(recipe(**options)):
        raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB.")
    assert "\n" not in str(raised.value)
    return str(raised.value)


def test_the_remedies_fit_the_recipe():
    text = message({"per_device_train_batch_size": 16, "gradient_accumulation_steps": 2, "max_length": 512})
    assert "per_device_train_batch_size to 8 and gradient_accumulation_steps to 4" in text
    for name in (
        "gradient_checkpointing to true",
        "recompute_gate_up to true",
        "load_in_4bit to true",
        "max_length below 512",
    ):
        assert name in text
    assert "step_mode" not in text


def test_remedies_that_are_taken_are_not_repeated():
    taken = {"per_device_train_batch_size": 1, "gradient_checkpointing": True, "load_in_4bit": True}
    text = message(taken)
    assert not any(name in text for name in ("batch_size", "gradient_checkpointing", "load_in_4bit"))
    assert "max_length" in text
    assert "step_mode to eager" in message({"step_mode": "graph"})


def test_a_run_out_of_memory_is_one_line(tiny_recipe, monkeypatch):
    def compute_loss(self, *args, **kwargs):
        raise torch.OutOfMemoryError("CUDA out of memory")

    monkeypatch.setattr(AdapterTrainer, "compute_loss", compute_loss)
    with pytest.raises(
        GraphLoraError, match="the GPU is out of memory; set per_device_train_batch_size to 2"
    ):
        train(Recipe.from_dict(tiny_recipe))


def test_other_errors_pass_through():
    with pytest.raises(RuntimeError, match="something else"), explained_memory(recipe()):
        raise RuntimeError("something else")


def test_memory_in_words():
    assert memory_text(3 * 2**30, 4 * 2**30) == "3.0 GiB allocated, 4.0 GiB reserved on the GPU"
    assert memory_text(3 * 2**29, None) == "1.5 GiB (the whole process)"
    assert memory_text(None, None) == "unknown"


def test_a_process_has_a_peak_and_reserves_nothing():
    assert peak_memory(torch.device("cpu")) > 50e6
    assert peak_reserved(torch.device("cpu")) is None


@pytest.mark.gpu
def test_a_gpu_run_records_both_peaks(tiny_recipe):
    result = train(Recipe.from_dict(tiny_recipe | {"training_args": {"disable_tqdm": True}}))
    assert 0 < result.record.peak_memory <= result.record.metrics["peak_reserved"]
