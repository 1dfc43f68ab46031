"""What the authors' released code gets wrong, row by row of docs/deviations.md ("Practice around the method").

Rows that are tested elsewhere: the best checkpoint on the whole validation split and exact resume
(tests/training/test_run.py), a held-out validation split for every task (tests/tasks/test_task.py), padding
(test_padding.py), loads outside training (test_loads.py), the data order (tests/training/test_trainer.py), backward
passes against gradcheck with dropout on (tests/ops), bounds of lambda and sigma (test_coordination_state.py), ties
(test_router_flaws.py), several processes (tests/trainers/test_two_processes.py).
"""

import json
import random

import pytest
import torch
from peft import PeftConfig, PeftModel
from tiny_llama import adapter_config, adapter_state, assert_same, layers, make_base, make_batch, make_model
from torch.utils._python_dispatch import TorchDispatchMode

BATCH = make_batch([6, 4])


@pytest.mark.parametrize("granularity", ["ffn", "linear"])
@pytest.mark.parametrize("backend", ["eager", "torch"])
def test_dropout_is_off_in_evaluation(granularity, backend):
    model = make_model(lora_dropout=0.5, expert_granularity=granularity, backend=backend)
    training = [model(**BATCH).logits for _ in range(2)]
    assert not torch.equal(*training)
    model.eval()
    assert torch.equal(model(**BATCH).logits, model(**BATCH).logits)
    without = make_model(expert_granularity=granularity, backend=backend).eval()
    without.load_state_dict(model.state_dict())
    assert torch.equal(without(**BATCH).logits, model(**BATCH).logits)


def test_the_graph_is_saved_and_not_rebuilt(tmp_path):
    """Neither from a seed, nor from the trained features that a similarity graph began with."""
    model = make_model(edge_init="similarity", expert_features="projected", edge_density=0.6)
    graphs = [layer.router("default").adjacency.clone() for layer in layers(model)]
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if "expert_proj" in name:
                parameter.copy_(torch.randn_like(parameter))
        layers(model)[0].router("default").adjacency.copy_(1 - torch.eye(4) - graphs[0])
    changed = [layer.router("default").adjacency.clone() for layer in layers(model)]
    model.save_pretrained(tmp_path)
    loaded = PeftModel.from_pretrained(make_base(), tmp_path)
    assert [layer.router("default").adjacency.tolist() for layer in layers(loaded)] == [
        graph.tolist() for graph in changed
    ]
    assert changed[0].tolist() != graphs[0].tolist()


def test_any_number_of_tokens_in_one_forward():
    model = make_model(base=make_base(max_position_embeddings=8192, num_hidden_layers=1), num_experts=8)
    long = make_batch([5000])
    out = model(**long)
    out.loss.backward()
    assert out.router_logits[0].shape == (5000, 8)
    assert torch.isfinite(out.loss)
    graph = layers(model)[0].router("default").adjacency
    assert graph.numel() == 64, "one graph for all tokens"


def test_lambda_sigma_features_and_loads_are_registered():
    for features in ("embedding", "projected"):
        model = make_model(expert_features=features)
        trained = {n.rpartition(".")[2] for n, p in model.named_parameters() if p.requires_grad}
        saved = {n.rpartition(".")[2] for n in adapter_state(model)}
        assert {"poisson_rate_bias", "normal_scale_bias"} <= trained
        assert {"cumulative_weights", "adjacency", "expert_features", "logit_offset"} <= saved
        assert ("expert_features" in trained) == (features == "embedding")


@pytest.mark.parametrize("preset", ["graphlora", "paper", "released"])
@pytest.mark.filterwarnings("ignore:.*expert graphs hold twins")
def test_an_exported_adapter_loads_and_gives_the_same_outputs(preset, tmp_path):
    model = make_model(
        preset=preset,
        edge_density=None,
        router_poisson_loss_coef=None,
        router_normal_loss_coef=None,
        load_window=None,
    )
    model(**BATCH)
    model.save_pretrained(tmp_path)
    files = {path.name for path in tmp_path.iterdir()}
    assert "adapter_model.safetensors" in files
    assert not any(name.endswith((".bin", ".pt", ".pkl")) for name in files)
    stored = json.loads((tmp_path / "adapter_config.json").read_text())
    again = PeftConfig.from_pretrained(tmp_path)
    assert again.preset == preset and stored["router_normal_loss_coef"] == again.router_normal_loss_coef
    loaded = PeftModel.from_pretrained(make_base(), tmp_path, is_trainable=True)
    assert_same(adapter_state(model), adapter_state(loaded), 0.0)
    model.eval(), loaded.eval()
    ours, theirs = model(**BATCH), loaded(**BATCH)
    assert torch.equal(ours.logits, theirs.logits)
    assert torch.equal(ours.aux_loss, theirs.aux_loss)


def test_graphs_depend_on_their_seed_alone():
    """Whatever the state of the global generators, and one graph per block."""

    def graphs(torch_seed, **config):
        random.seed(torch_seed)
        model = make_model(seed=torch_seed, num_experts=8, edge_density=0.3, **config)
        return [layer.router("default").adjacency.tolist() for layer in layers(model)]

    assert graphs(0, graph_seed=1) == graphs(7, graph_seed=1)
    assert graphs(0, graph_seed=1) != graphs(0, graph_seed=2)
    first, second = graphs(0, graph_seed=1)
    assert first != second
    first, second = graphs(0, graph_seed=1, shared_graph=True)
    assert first == second


def test_one_seed_makes_one_adapter():
    one, other = adapter_state(make_model(seed=3)), adapter_state(make_model(seed=3))
    assert_same(one, other, 0.0)
    another = adapter_state(make_model(seed=4))
    assert any(not torch.equal(value, another[name]) for name, value in one.items() if "lora_A" in name)


class HostReads(TorchDispatchMode):
    """Counts reads of a tensor's value by the host, each of which waits for a GPU."""

    def __init__(self):
        super().__init__()
        self.count = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        self.count += func in (torch.ops.aten._local_scalar_dense.default, torch.ops.aten.equal.default)
        return func(*args, **(kwargs or {}))


@pytest.mark.parametrize(
    "config", [{}, {"preset": "paper", "edges": [[0, 1], [1, 2]]}, {"edge_init": "learned"}]
)
def test_a_training_step_reads_nothing_back_from_the_device(config):
    def reads(model):
        model.train()
        model(**BATCH).loss.backward()
        with HostReads() as mode:
            model(**BATCH).loss.backward()
        return mode.count

    assert reads(make_model(**config)) == reads(make_base())


def test_the_defaults_hold_one_dropout_for_all():
    assert adapter_config().lora_dropout == 0.0
