"""The same seed gives the same adapter, bit for bit, on every path; deterministic mode asks PyTorch to see to it."""

import hashlib
import os
from pathlib import Path

import pytest
import torch
import torch._inductor.config

from graphlora.errors import GraphLoraError
from graphlora.training import Recipe, train
from graphlora.training.determinism import deterministic_algorithms

GRAPHLORA = {"method": "graphlora", "num_experts": 4, "top_k": 2, "router_hidden_size": 16, "max_steps": 4}


def digest(recipe: dict, folder: Path, **changes) -> str:
    arguments = recipe["training_args"] | changes.pop("training_args", {})
    values = recipe | GRAPHLORA | changes | {"output_dir": str(folder), "training_args": arguments}
    train(Recipe.from_dict(values | {"eval_strategy": "no", "load_best_model_at_end": False}))
    return hashlib.sha256((folder / "adapter_model.safetensors").read_bytes()).hexdigest()


@pytest.mark.parametrize(
    "changes",
    [
        {"backend": "eager"},
        {"backend": "torch", "gradient_accumulation_steps": 2, "gradient_checkpointing": True},
        {"packing": True, "train_sampling_strategy": "group_by_length"},
    ],
    ids=str,
)
def test_the_same_seed_gives_the_same_bits(tiny_recipe, tmp_path, changes):
    one, same = (digest(tiny_recipe, tmp_path / name, **changes) for name in ("one", "same"))
    assert one == same


def test_neither_workers_nor_deterministic_mode_change_the_bits(tiny_recipe, tmp_path):
    plain = digest(tiny_recipe, tmp_path / "plain")
    assert digest(tiny_recipe, tmp_path / "deterministic", deterministic=True) == plain
    assert digest(tiny_recipe, tmp_path / "seed", seed=1) != plain
    workers = {"training_args": {"dataloader_num_workers": 2}}
    assert digest(tiny_recipe, tmp_path / "workers", **workers) == plain


def test_deterministic_mode_holds_during_the_run_and_ends_with_it(tiny_recipe, tmp_path, monkeypatch):
    from graphlora.training.trainer import AdapterTrainer

    seen = []
    step = AdapterTrainer.training_step

    def look(self, *args, **kwargs):
        settings = torch.are_deterministic_algorithms_enabled(), torch._inductor.config.deterministic
        seen.append((*settings, os.environ.get("CUBLAS_WORKSPACE_CONFIG")))
        return step(self, *args, **kwargs)

    monkeypatch.setattr(AdapterTrainer, "training_step", look)
    monkeypatch.delenv("CUBLAS_WORKSPACE_CONFIG", raising=False)
    digest(tiny_recipe, tmp_path / "out", deterministic=True, max_steps=1)
    assert seen == [(True, True, ":4096:8")]
    assert not torch.are_deterministic_algorithms_enabled()
    assert not torch._inductor.config.deterministic
    assert "CUBLAS_WORKSPACE_CONFIG" not in os.environ


def test_settings_come_back_after_an_error(monkeypatch):
    monkeypatch.setenv("CUBLAS_WORKSPACE_CONFIG", ":16:8")
    with pytest.raises(RuntimeError, match="size of tensor"), deterministic_algorithms(True):
        torch.ones(2) + torch.ones(3)
    assert not torch.are_deterministic_algorithms_enabled()
    assert not torch._inductor.config.deterministic
    assert os.environ["CUBLAS_WORKSPACE_CONFIG"] == ":16:8"


def test_an_operation_without_a_deterministic_form_is_refused():
    values, place = torch.zeros(3), torch.tensor([0, 0])
    with (
        pytest.raises(GraphLoraError, match=r"put_.* leave out --deterministic"),
        deterministic_algorithms(True),
    ):
        values.put_(place, torch.ones(2))
    values.put_(place, torch.ones(2))


def test_transformers_own_mode_is_refused_with_ours(tiny_recipe, tmp_path):
    with pytest.raises(GraphLoraError, match="use --deterministic"):
        digest(tiny_recipe, tmp_path / "out", training_args={"full_determinism": True})


@pytest.mark.gpu
def test_a_gpu_gives_the_same_bits(tiny_recipe, tmp_path):
    for backend in ("torch", "triton"):
        changes = {"backend": backend, "deterministic": True, "training_args": {"use_cpu": False}}
        one, same = (digest(tiny_recipe, tmp_path / backend / name, **changes) for name in ("one", "same"))
        assert one == same, backend
