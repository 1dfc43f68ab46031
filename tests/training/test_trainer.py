"""Pieces of the trainer: order of rows, weight decay, LoRA+, the loss watch, the routing summary."""

from types import SimpleNamespace

import pytest
import torch
from safetensors.torch import load_file
from torch import nn

from graphlora.training import Recipe, train
from graphlora.training.adapting import add_adapter
from graphlora.training.callbacks import routing_summary
from graphlora.training.loading import load_base_model, load_tokenizer
from graphlora.training.row_order import EpochSampler
from graphlora.training.run_data import load_data
from graphlora.training.trainer import AdapterTrainer
from graphlora.training.trainer_setup import make_trainer


@pytest.fixture
def trainer(tiny_recipe):
    def make(**options):
        values = (
            tiny_recipe | {"method": "graphlora", "num_experts": 4, "metric_for_best_model": "acc"} | options
        )
        recipe = Recipe.from_dict(values)
        tokenizer = load_tokenizer(recipe.model)
        model = add_adapter(load_base_model(recipe.model, torch.float32), recipe)
        return make_trainer(recipe, model, tokenizer, load_data(recipe, tokenizer), torch.float32)

    return make


def groups_of(trainer) -> dict[str, dict]:
    names = {id(parameter): name for name, parameter in trainer.model.named_parameters()}
    return {
        names[id(parameter)]: {key: value for key, value in group.items() if key != "params"}
        for group in trainer.create_optimizer().param_groups
        for parameter in group["params"]
    }


@pytest.mark.parametrize("ratio", [None, 8.0])
def test_lambda_and_sigma_take_no_weight_decay(trainer, ratio):
    found = groups_of(trainer(weight_decay=0.1, loraplus_lr_ratio=ratio))
    bounded = {name for name in found if "poisson" in name or "normal_scale" in name}
    assert len(bounded) == 4
    assert all(found[name]["weight_decay"] == 0 for name in bounded)
    assert all(
        group["weight_decay"] == 0.1 for name, group in found.items() if name.endswith(("lora_A", "lora_B"))
    )


def test_loraplus_raises_the_rate_of_b_alone(trainer):
    made = trainer(loraplus_lr_ratio=8.0, learning_rate=1e-3)
    found = groups_of(made)
    assert set(found) == {
        name for name, parameter in made.model.named_parameters() if parameter.requires_grad
    }
    for name, group in found.items():
        assert group["lr"] == pytest.approx(8e-3 if "lora_B" in name else 1e-3), name


def test_rows_are_shuffled_anew_each_epoch_and_alike_for_a_seed():
    sampler = EpochSampler([1] * 50, seed=3)
    orders = []
    for epoch in (0, 1, 0):
        sampler.set_epoch(epoch)
        orders.append(list(sampler))
    assert sorted(orders[0]) == list(range(50))
    assert orders[0] != orders[1]
    assert orders[0] == orders[2]
    assert list(EpochSampler([1] * 50, seed=4)) != orders[0]


def test_grouped_rows_are_of_similar_length():
    lengths = [number % 25 for number in range(400)]
    order = list(EpochSampler(lengths, seed=0, group=8))
    spread = [
        max(lengths[i] for i in order[k : k + 8]) - min(lengths[i] for i in order[k : k + 8])
        for k in range(0, 400, 8)
    ]
    assert sorted(order) == list(range(400))
    assert sum(spread) / len(spread) < 4


def test_the_routing_summary_is_bounded_and_means_what_it_says():
    def layer(number):
        share = 0.25 + number / 1000
        load = [share, 0.25, 0.25, 0.5 - share]
        return {
            "expert_load": load,
            "entropy": 0.9,
            "dead_experts": number % 2,
            "poisson_rate": 1.5,
            "normal_scale": 2.0,
        }

    stats = {f"model.layers.{number}.mlp": layer(number) for number in range(48)}
    model = SimpleNamespace(base_model=SimpleNamespace(routing_stats=lambda: stats))
    summary = routing_summary(model)
    assert len(summary) == 30
    assert summary["router/dead_experts_mean"] == 0.5
    assert summary["router/expert_load_max_max"] == pytest.approx(4 * 0.297)
    assert summary["router/layer_47/poisson_rate"] == 1.5
    assert routing_summary(nn.Linear(1, 1)) == {}


def test_steps_do_not_look_for_what_is_trained(any_recipe, monkeypatch):
    """Clipped and zeroed is what the Trainer clips and zeroes, without going through all modules at each step."""
    options = any_recipe | {"eval_strategy": "no", "max_grad_norm": 0.01}
    seen, original = [], nn.Module.zero_grad

    def zero_grad(self, *args):
        seen.append(type(self))
        original(self, *args)

    monkeypatch.setattr(nn.Module, "zero_grad", zero_grad)
    result = train(Recipe.from_dict(options))
    assert len(seen) == 1  # before the first step
    assert "zero_grad" not in vars(result.model)
    found = load_file(result.output_dir / "adapter_model.safetensors")
    monkeypatch.setattr(
        AdapterTrainer, "_remember_trained", lambda self, model: setattr(self, "_trained", [])
    )
    seen.clear()
    result = train(Recipe.from_dict(options), overwrite=True)
    assert len(seen) == 1 + result.metrics["steps"]
    expected = load_file(result.output_dir / "adapter_model.safetensors")
    assert all(torch.equal(found[name], value) for name, value in expected.items())
