"""Which mode a run takes, and what is refused with its reason."""

from dataclasses import fields
from types import SimpleNamespace

import pytest
import torch
from tiny_llama import make_base

from graphlora.errors import GraphLoraError
from graphlora.training import Recipe, step_mode
from graphlora.training.data import Encoded, Encoding
from graphlora.training.step_mode import (
    Work,
    choose_step_mode,
    compiling_pays,
    resolve_step_mode,
    why_not_filled,
    why_not_recorded,
    work_of,
)
from graphlora.training.streaming import TokenStream

CPU, GPU = torch.device("cpu"), torch.device("cuda", 0)


def recipe(**options) -> Recipe:
    return Recipe.from_dict({"model": "m", "task": "quiz", "output_dir": "out"} | options)


def work(longest: int, batches: int | None = 10, shapes: int = 1, tokens: float | None = None) -> Work:
    return Work(longest, longest if tokens is None else tokens, batches, shapes)


def test_small_work_on_a_gpu_is_recorded():
    assert choose_step_mode(135_000_000, 16, work(128), GPU) == "graph"
    assert choose_step_mode(135_000_000, 16, work(128), CPU) == "eager"
    assert choose_step_mode(1_700_000_000, 8, work(512), GPU) == "graph"
    assert choose_step_mode(2_300_000_000, 8, work(512), GPU) == "eager"
    assert choose_step_mode(135_000_000, 1, work(10_000_000), GPU) == "eager"
    assert choose_step_mode(70_000_000_000, 1, work(8), GPU) == "eager"


def test_long_runs_are_compiled():
    small, large = 135_000_000, 8_000_000_000
    assert choose_step_mode(small, 16, work(128, 100_000, 4), GPU) == "compiled_graph"
    assert choose_step_mode(small, 16, work(128, 100_000, 4), CPU) == "eager"
    assert choose_step_mode(small, 16, work(128, 1_000, 4), GPU) == "graph"
    assert choose_step_mode(small, 16, work(128, None), GPU) == "graph"
    assert choose_step_mode(1_700_000_000, 16, work(512, 10_000, 4, 8192), GPU) == "compiled_graph"
    assert choose_step_mode(1_700_000_000, 32, work(512, 10_000, 4, 8192), GPU) == "compile"
    assert choose_step_mode(large, 8, work(512, 10_000, 4, 8 * 512), GPU) == "compile"
    assert choose_step_mode(large, 8, work(512, 10_000, 32, 8 * 512), GPU) == "eager"
    assert choose_step_mode(large, 8, work(512, 200, 1, 8 * 512), GPU) == "eager"


@pytest.mark.parametrize("num_parameters", [135_000_000, 8_000_000_000])
def test_a_run_that_is_compiled_spares_more_than_compiling_takes(num_parameters):
    """By the figures that were measured on an H200: seconds that a batch is shorter, and 14 at most per shape."""
    tokens, spared = (2048, 8.6e-3) if num_parameters < 1e9 else (4096, 4 * 20e-3)
    for shapes in (1, 5, 20):
        batches = next(
            n for n in range(0, 10**6, 50) if compiling_pays(num_parameters, work(9, n, shapes, tokens))
        )
        assert batches * spared > 14 * shapes


def test_the_work_of_a_run_is_counted(monkeypatch):
    rows = [{"input_ids": [1] * length, "labels": [1] * length} for length in (20, 30, 60, 100)]
    train = Encoded(rows, longest=100)
    options = {"per_device_train_batch_size": 2, "num_train_epochs": 3}
    assert work_of(recipe(**options), train) == Work(100, 2 * 52.5, 6, 3)
    assert work_of(recipe(packing=True, **options), train).shapes == 4
    steps = options | {"max_steps": 5, "gradient_accumulation_steps": 4}
    assert work_of(recipe(**steps), train).batches == 20
    monkeypatch.setenv("WORLD_SIZE", "2")
    assert work_of(recipe(**options), train).batches == 3
    assert work_of(recipe(**steps), train).batches == 20


def test_the_rows_of_a_stream_are_not_counted():
    stream = TokenStream(None, None, Encoding(max_length=256), "")
    options = {"streaming": True, "per_device_train_batch_size": 8}
    assert work_of(recipe(**options), stream) == Work(256, 8 * 128.5, None, 8)
    assert work_of(recipe(max_steps=7, **options), stream).batches == 7


@pytest.mark.parametrize(
    ("options", "environment", "reason"),
    [
        ({"gradient_checkpointing": True}, {}, "gradient_checkpointing"),
        ({"fp16": True}, {}, "bf16 does not"),
        ({"backend": "eager"}, {}, "the backend eager"),
        ({}, {"WORLD_SIZE": "2"}, "several processes"),
    ],
)
def test_what_cannot_be_recorded_is_refused_and_avoided(monkeypatch, options, environment, reason):
    for name, value in environment.items():
        monkeypatch.setenv(name, value)
    model = make_base()
    assert resolve_step_mode(recipe(**options), model, GPU, work(64)) == "eager"
    with pytest.raises(GraphLoraError, match=rf"step_mode is graph, but .*{reason}.*; set step_mode to"):
        resolve_step_mode(recipe(step_mode="graph", **options), model, GPU, work(64))


@pytest.mark.parametrize("mode", ["compile", "graph"])
@pytest.mark.parametrize(
    ("changes", "reason"),
    [
        ({"layer_types": ["full_attention", "sliding_attention"]}, "sliding attention needs two masks"),
        (
            {"_attn_implementation": "flash_attention_2"},
            "flash_attention_2 (cannot mask|may wait for the device)",
        ),
    ],
)
def test_packed_rows_are_not_filled_up_where_attention_would_see_it(mode, changes, reason):
    model = make_base()
    for name, value in changes.items():
        setattr(model.config, name, value)
    packed = {"packing": True}
    assert resolve_step_mode(recipe(**packed), model, GPU, work(64, 10**6)) == "eager"
    with pytest.raises(GraphLoraError, match=rf"step_mode is {mode}, but .*{reason}.*; set step_mode to"):
        resolve_step_mode(recipe(step_mode=mode, **packed), model, GPU, work(64))
    assert resolve_step_mode(recipe(step_mode="compile"), model, GPU, work(64)) == "compile"


@pytest.mark.parametrize(
    ("changes", "fits"),
    [
        ({"layer_types": ["full_attention", "sliding_attention"], "sliding_window": 64}, True),
        ({"layer_types": ["full_attention", "sliding_attention"], "sliding_window": 63}, False),
        ({"layer_types": ["full_attention"], "sliding_window": 8}, True),
        ({"sliding_window": 64}, True),
        ({"sliding_window": 63}, False),  # Mistral names no layers
        ({"layer_types": ["chunked_attention"]}, False),
        ({}, True),
    ],
)
def test_a_window_that_holds_every_row_does_not_slide(changes, fits):
    config = SimpleNamespace(_attn_implementation="sdpa", **changes)
    assert (why_not_filled(recipe(packing=True, max_length=64), config) is None) == fits


def test_the_help_says_what_auto_takes():
    text = next(item for item in fields(Recipe) if item.name == "step_mode").metadata["help"]
    assert "auto: on an NVIDIA GPU graph for small models, and compiled where the run is long enough" in text
    small, large = 10**8, 10**10
    assert choose_step_mode(small, 1, work(64), GPU) == "graph"
    assert choose_step_mode(large, 1, work(64), GPU) == choose_step_mode(small, 1, work(64), CPU) == "eager"
    assert choose_step_mode(large, 1, work(64, 10**6), GPU) == "compile"


def test_a_cpu_has_no_graphs_but_runs_the_other_modes():
    model = make_base()
    with pytest.raises(GraphLoraError, match="CUDA graphs need an NVIDIA GPU, not cpu"):
        resolve_step_mode(recipe(step_mode="graph"), model, CPU, work(64))
    assert resolve_step_mode(recipe(), model, CPU, work(64)) == "eager"
    assert resolve_step_mode(recipe(step_mode="compile"), model, CPU, work(64)) == "compile"


def test_auto_records_what_nothing_keeps_from_it(monkeypatch):
    model = make_base()
    assert resolve_step_mode(recipe(), model, GPU, work(64)) == "graph"
    assert resolve_step_mode(recipe(loss_kernel="liger"), model, GPU, work(64)) == "eager"
    long = work(64, 10**6)
    assert resolve_step_mode(recipe(), model, GPU, long) == "compiled_graph"
    assert resolve_step_mode(recipe(deterministic=True), model, GPU, long) == "graph"
    assert resolve_step_mode(recipe(gradient_checkpointing=True), model, GPU, long) == "eager"
    monkeypatch.setattr(step_mode, "GRAPH_MAX_WORK", 0)
    monkeypatch.setattr(step_mode, "GRAPH_MAX_COMPILED_WORK", 0)
    assert resolve_step_mode(recipe(), model, GPU, work(64)) == "eager"
    assert resolve_step_mode(recipe(), model, GPU, long) == "compile"
    assert resolve_step_mode(recipe(deterministic=True), model, GPU, long) == "eager"


def test_the_attention_decides_too():
    model = make_base()
    model.config.layer_types = ["full_attention", "sliding_attention"]
    assert why_not_recorded(recipe(), model, GPU) is None
    assert "two masks" in why_not_recorded(recipe(packing=True), model, GPU)
    model.config._attn_implementation = "flash_attention_2"
    assert "attn_implementation flash_attention_2" in why_not_recorded(recipe(), model, GPU)


def test_a_recorded_step_cannot_hold_liger():
    with pytest.raises(GraphLoraError, match="counts labels on the host"):
        recipe(step_mode="graph", loss_kernel="liger")
