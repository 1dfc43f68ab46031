"""Which mode a run takes, and what is refused with its reason."""

from dataclasses import fields

import pytest
import torch
from tiny_llama import make_base

from graphlora.errors import GraphLoraError
from graphlora.training import Recipe, step_mode
from graphlora.training.step_mode import choose_step_mode, resolve_step_mode, why_not_recorded

CPU, GPU = torch.device("cpu"), torch.device("cuda", 0)


def recipe(**options) -> Recipe:
    return Recipe.from_dict({"model": "m", "task": "quiz", "output_dir": "out"} | options)


def test_small_work_on_a_gpu_is_recorded():
    assert choose_step_mode(135_000_000, 16 * 128, GPU) == "graph"
    assert choose_step_mode(135_000_000, 16 * 128, CPU) == "eager"
    assert choose_step_mode(1_700_000_000, 8 * 512, GPU) == "graph"
    assert choose_step_mode(2_300_000_000, 8 * 512, GPU) == "eager"
    assert choose_step_mode(135_000_000, 10_000_000, GPU) == "eager"
    assert choose_step_mode(70_000_000_000, 8, GPU) == "eager"


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
    assert resolve_step_mode(recipe(**options), model, GPU, 64) == "eager"
    with pytest.raises(GraphLoraError, match=rf"step_mode is graph, but .*{reason}.*; set step_mode to"):
        resolve_step_mode(recipe(step_mode="graph", **options), model, GPU, 64)


def test_the_help_says_what_auto_takes():
    text = next(item for item in fields(Recipe) if item.name == "step_mode").metadata["help"]
    assert text.endswith("auto: graph for small models on an NVIDIA GPU, else eager")
    small, large = 10**8, 10**10
    assert choose_step_mode(small, 64, GPU) == "graph"
    assert choose_step_mode(large, 64, GPU) == choose_step_mode(small, 64, CPU) == "eager"


def test_a_cpu_has_no_graphs_but_runs_the_other_modes():
    model = make_base()
    with pytest.raises(GraphLoraError, match="CUDA graphs need an NVIDIA GPU, not cpu"):
        resolve_step_mode(recipe(step_mode="graph"), model, CPU, 64)
    assert resolve_step_mode(recipe(), model, CPU, 64) == "eager"
    assert resolve_step_mode(recipe(step_mode="compile"), model, CPU, 64) == "compile"


def test_auto_records_what_nothing_keeps_from_it(monkeypatch):
    model = make_base()
    assert resolve_step_mode(recipe(), model, GPU, 64) == "graph"
    assert resolve_step_mode(recipe(loss_kernel="liger"), model, GPU, 64) == "eager"
    monkeypatch.setattr(step_mode, "GRAPH_MAX_WORK", 0)
    assert resolve_step_mode(recipe(), model, GPU, 64) == "eager"


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
