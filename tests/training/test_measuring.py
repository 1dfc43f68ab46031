"""Memory: what a run took."""

import pytest
import torch

from graphlora.training import Recipe, train
from graphlora.training.measuring import memory_text, peak_memory, peak_reserved


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
