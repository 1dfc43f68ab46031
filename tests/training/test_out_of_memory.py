"""Out of memory: one line of remedies, which kinds of failure it is for, and how good the predicted savings are."""

from dataclasses import replace

import pytest
import torch
from small_llama import ADAPTERS, with_vocabulary

from graphlora import GraphLoraConfig
from graphlora.benchmark.layer import Setting
from graphlora.benchmark.prediction import measure_whole
from graphlora.benchmark.savings import MemoryModel, Run
from graphlora.errors import GraphLoraError
from graphlora.training import Recipe, train
from graphlora.training.out_of_memory import explained_memory
from graphlora.training.trainer import AdapterTrainer

CPU = torch.device("cpu")


def recipe(**options) -> Recipe:
    return Recipe.from_dict({"model": "m", "task": "quiz", "output_dir": "out"} | options)


def fail(error: Exception, config: object = None, **options) -> None:
    with explained_memory(recipe(**options)) as facts:
        facts.config = config
        raise error


def message(options: dict) -> str:
    error = torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB.")
    with pytest.raises(GraphLoraError) as raised:
        fail(error, config=object(), **options)
    assert "\n" not in str(raised.value)
    return str(raised.value)


def test_the_remedies_fit_the_recipe():
    text = message({"per_device_train_batch_size": 16, "gradient_accumulation_steps": 2, "max_length": 512})
    assert "per_device_train_batch_size to 8 and gradient_accumulation_steps to 4" in text
    for name in (
        "gradient_checkpointing to true",
        "recompute_gate_up to true",
        "load_in_4bit to true",
        "max_length to 256",
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
        GraphLoraError,
        match=r"the GPU is out of memory; a step .* takes about 0\.\d+ GB .* set per_device_train_batch_size to 2 "
        r"and gradient_accumulation_steps to 2 \(about 0\.\d+ GB less\)",
    ):
        train(Recipe.from_dict(tiny_recipe))


def test_other_errors_pass_through():
    with pytest.raises(RuntimeError, match="something else"), explained_memory(recipe()):
        raise RuntimeError("something else")


@pytest.mark.parametrize(
    "error",
    [
        MemoryError(),
        RuntimeError(
            "[enforce fail at alloc_cpu.cpp:124] DefaultCPUAllocator: can't allocate memory: you tried"
        ),
        OSError(12, "Cannot allocate memory"),
    ],
    ids=lambda error: type(error).__name__,
)
def test_a_machine_without_memory_is_told_apart_from_a_gpu(error):
    line = "the machine is out of memory while it loads the model; set load_in_4bit to true"
    with pytest.raises(GraphLoraError, match=line):
        fail(error)


def test_what_caused_an_error_counts():
    error = GraphLoraError("cannot load model m")
    error.__cause__ = OSError(12, "Cannot allocate memory")
    with pytest.raises(GraphLoraError, match="the machine is out of memory"):
        fail(error)


def test_an_error_that_is_its_own_cause_is_left_alone():
    error = GraphLoraError("cannot write out")
    error.__cause__ = error
    with pytest.raises(GraphLoraError, match="cannot write out"):
        fail(error)


# Relative to the measured peak.
TOLERANCE = 0.15


@pytest.mark.weekly
@pytest.mark.parametrize("kind", ADAPTERS)
def test_predicted_savings_are_those_of_real_runs(kind):
    run = Run(rows=4, length=160, positions=160)
    config = with_vocabulary(700)
    model = MemoryModel(config, ADAPTERS[kind], CPU, torch.float32)

    def measured(rows=4, length=160, gradient_checkpointing=False, recompute_gate_up=False) -> int:
        adapter = ADAPTERS[kind]
        if recompute_gate_up:
            adapter = GraphLoraConfig(task_type="CAUSAL_LM", recompute_gate_up=True)
        setting = Setting(config, rows, length, CPU, torch.float32, gradient_checkpointing, iterations=1)
        return measure_whole(setting, adapter).peak

    peak = measured()
    assert model.peak(run) == pytest.approx(peak, rel=TOLERANCE)
    cases = [{"rows": 2}, {"gradient_checkpointing": True}, {"length": 80}]
    cases += [{"recompute_gate_up": True}] if kind == "graphlora" else []
    for changes in cases:
        saved = peak - measured(**changes)
        assert saved > 0.02 * peak
        assert abs(model.saving(run, **changes) - saved) < TOLERANCE * peak, changes
    assert model.saving(run, load_in_4bit=True) == pytest.approx(
        0.87 * (model.weights(False) - 2 * 700 * 128 * 4), rel=0.01
    )


def test_a_fused_loss_saves_the_logits_of_a_large_vocabulary():
    model = MemoryModel(with_vocabulary(50_000), ADAPTERS["lora"], CPU, torch.float32)
    run = Run(rows=4, length=160, positions=160)
    assert model.saving(run, fused_loss=True) > 4 * 160 * 50_000 * 4
    assert model.saving(replace(run, positions=1), fused_loss=True) < 1e6


@pytest.mark.gpu
def test_a_gpu_without_room_names_settings_and_their_savings(tiny_recipe):
    """A real failed allocation: the process may use a small share of the GPU."""
    total = torch.cuda.get_device_properties(0).total_memory
    torch.cuda.set_per_process_memory_fraction(30e6 / total)
    options = {
        "training_args": {"disable_tqdm": True},
        "per_device_train_batch_size": 36,
        "method": "graphlora",
    }
    options |= {"num_experts": 64, "r": 64}
    try:
        with pytest.raises(GraphLoraError, match="the GPU is out of memory"):
            train(Recipe.from_dict(tiny_recipe | options))
    finally:
        torch.cuda.set_per_process_memory_fraction(1.0)
