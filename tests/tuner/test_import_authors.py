"""`import_checkpoint`: the authors' files become an adapter that PEFT loads, or one line says why not."""

import io
import json
import os
import pickle
import shutil
import zipfile
from pathlib import Path

import peft
import pytest
import torch
from safetensors.torch import load_file, save_file
from torch.nn import functional as F
from transformers import AutoModelForCausalLM

from graphlora.errors import GraphLoraError
from graphlora.tuner.import_authors import import_checkpoint

RECORDED = Path(__file__).parents[1] / "parity" / "data" / "model_tiny"
SOURCE, BASE = RECORDED / "graphlora", RECORDED / "base"
FIRST = "mixlora.layers.0"


@pytest.fixture(scope="module")
def recorded():
    return load_file(RECORDED / "outputs.safetensors")


@pytest.fixture
def stored_graph(recorded, tmp_path):
    """The graph trained with, as a file."""
    path = tmp_path / "graph.safetensors"
    names = [f"layers.{i}.adjacency" for i in range(2)]
    save_file({name: recorded[f"stored.{name}"].clone() for name in names}, path)
    return path


@pytest.fixture
def source(tmp_path):
    """A copy of the authors' checkpoint that a test may change."""
    return Path(shutil.copytree(SOURCE, tmp_path / "source"))


def change_tensors(source, change):
    path = source / "adapter_model.bin"
    tensors = torch.load(path, weights_only=True)
    change(tensors)
    torch.save(tensors, path)


def change_settings(source, **changes):
    path = source / "adapter_config.json"
    settings = json.loads(path.read_text()) | changes
    path.write_text(json.dumps({k: v for k, v in settings.items() if v is not None}))


def base_model():
    return AutoModelForCausalLM.from_pretrained(BASE, dtype=torch.float32)


@torch.no_grad()
def assert_logits(model, recorded, graph):
    logits = model(recorded["input_ids"]).logits
    torch.testing.assert_close(logits, recorded[f"{graph}.logits"], rtol=0, atol=1e-5)


def test_loads_onto_the_base_with_the_recorded_logits(recorded, stored_graph, tmp_path):
    imported = import_checkpoint(SOURCE, tmp_path / "adapter", graph=stored_graph)
    assert imported.notes == ()
    assert sorted(path.name for path in imported.path.iterdir()) == [
        "adapter_config.json",
        "adapter_model.safetensors",
    ]
    assert_logits(peft.PeftModel.from_pretrained(base_model(), imported.path), recorded, "stored")


def test_loads_by_its_own_name_through_the_auto_class(recorded, tmp_path):
    imported = import_checkpoint(SOURCE, tmp_path / "adapter", base_model=str(BASE))
    model = peft.AutoPeftModelForCausalLM.from_pretrained(imported.path)
    assert_logits(model, recorded, "rebuilt")
    model.save_pretrained(tmp_path / "again")
    again = peft.PeftModel.from_pretrained(base_model(), tmp_path / "again")
    assert_logits(again, recorded, "rebuilt")


def test_says_that_a_rebuilt_graph_may_differ(recorded, tmp_path):
    imported = import_checkpoint(SOURCE, tmp_path / "adapter")
    assert len(imported.notes) == 1
    assert "may differ" in imported.notes[0]
    state = load_file(imported.path / "adapter_model.safetensors")
    for i in range(2):
        ours = state[f"base_model.model.model.layers.{i}.mlp.graphlora_router.adjacency"]
        assert torch.equal(ours, recorded[f"rebuilt.layers.{i}.adjacency"][:-1, :-1].fill_diagonal_(0))


def test_configuration(tmp_path):
    imported = import_checkpoint(SOURCE, tmp_path / "adapter")
    config = peft.PeftConfig.from_pretrained(imported.path)
    expected = {
        "preset": "released", "task_type": "CAUSAL_LM", "base_model_name_or_path": "base", "num_experts": 8,
        "top_k": 2, "r": 2, "lora_alpha": 4, "lora_dropout": 0.0005, "router_hidden_size": 32,
        "router_num_layers": 2, "edge_density": 0.25, "router_poisson_loss_coef": 0.005,
        "router_normal_loss_coef": 8.0, "target_modules": {"mlp"},
        "attention_target_modules": {f"self_attn.{p}_proj" for p in "qkvo"},
    }  # fmt: skip
    assert {name: getattr(config, name) for name in expected} == expected
    assert imported.num_layers == 2


def test_trains_on(stored_graph, recorded, tmp_path):
    imported = import_checkpoint(SOURCE, tmp_path / "adapter", graph=stored_graph)
    with pytest.MonkeyPatch.context() as patch:
        # The graph that is there before loading is random and may hold twins.
        patch.setattr("graphlora.tuner.layer.twin_experts", lambda adjacency: [])
        model = peft.PeftModel.from_pretrained(base_model(), imported.path, is_trainable=True)
    without_dropout = model.eval()(recorded["input_ids"])
    torch.testing.assert_close(
        without_dropout.aux_loss.detach(), recorded["stored.aux_loss"], rtol=1e-5, atol=0
    )
    model.train()(recorded["input_ids"], labels=recorded["input_ids"]).loss.backward()
    assert all(p.grad is not None for p in model.parameters() if p.requires_grad)


def test_edges_from_json_per_layer_and_for_all(tmp_path):
    path = tmp_path / "edges.json"
    path.write_text(json.dumps({"1": [], "0": [[5, 2]]}))
    per_layer = import_checkpoint(SOURCE, tmp_path / "a", graph=path)
    for_all = import_checkpoint(SOURCE, tmp_path / "b", graph=[[5, 2]])
    for imported, counts in ((per_layer, [1, 0]), (for_all, [1, 1])):
        state = load_file(imported.path / "adapter_model.safetensors")
        for i, count in enumerate(counts):
            adjacency = state[f"base_model.model.model.layers.{i}.mlp.graphlora_router.adjacency"]
            assert adjacency.sum() == 2 * count
            assert adjacency[2, 5] == adjacency[5, 2] == count


def make_linear(source):
    """The checkpoint with linear routers in place of the graph routers."""

    def change(tensors):
        for name in [name for name in tensors if ".gate." in name]:
            del tensors[name]
        generator = torch.Generator().manual_seed(0)
        for i in range(2):
            tensors[f"mixlora.layers.{i}.gate.weight"] = torch.randn(8, 64, generator=generator)

    change_tensors(source, change)
    change_settings(source, routing_strategy="mixlora", edges_thresholds=None, dim_gcn=None)


def test_linear_routers(source, recorded, tmp_path):
    make_linear(source)
    imported = import_checkpoint(source, tmp_path / "adapter")
    assert "linear" in imported.notes[0]
    model = peft.PeftModel.from_pretrained(base_model(), imported.path)
    inputs = {}
    for i in range(2):
        block = model.get_submodule(f"base_model.model.model.layers.{i}.mlp")
        block.register_forward_pre_hook(
            lambda module, args, i=i: inputs.__setitem__(i, args[0].flatten(0, 1))
        )
    with model.base_model.record_routing() as routing, torch.no_grad():
        outputs = model(recorded["input_ids"])
    tensors = torch.load(source / "adapter_model.bin", weights_only=True)
    for i in range(2):
        expected = F.linear(inputs[i], tensors[f"mixlora.layers.{i}.gate.weight"]).softmax(-1)
        torch.testing.assert_close(routing[f"model.layers.{i}.mlp"].router_probs, expected, rtol=0, atol=2e-6)
    assert outputs.aux_loss == 0


class Code:
    def __reduce__(self):
        return os.mkdir, ("made-by-the-pickle",)


def drop(pattern):
    def change(tensors):
        for name in [name for name in tensors if pattern in name]:
            del tensors[name]

    return lambda source: change_tensors(source, change)


def put(name, tensor):
    return lambda source: change_tensors(source, lambda tensors: tensors.update({name: tensor}))


def write(content):
    return lambda source: (source / "adapter_model.bin").write_bytes(content)


def zipped_code():
    buffer = io.BytesIO()
    torch.save({"weights": Code()}, buffer)
    return buffer.getvalue()


def zip_without_pickle():
    buffer = io.BytesIO()
    with zipfile.ZipFile(buffer, "w") as file:
        file.writestr("archive/readme", "nothing")
    return buffer.getvalue()


WHOLE = (SOURCE / "adapter_model.bin").read_bytes()
BROKEN = {
    "no directory": (shutil.rmtree, "has no adapter_config.json"),
    "no weights": (lambda source: (source / "adapter_model.bin").unlink(), "has no adapter_model.bin"),
    "config is no JSON": (lambda s: (s / "adapter_config.json").write_text("{"), "is broken"),
    "config is a list": (lambda s: (s / "adapter_config.json").write_text("[]"), "no JSON object"),
    "truncated": (write(WHOLE[:20000]), "truncated"),
    "empty": (write(b""), "truncated"),
    "bare pickle with code": (write(pickle.dumps(Code())), "no file of torch.save"),
    "code": (write(zipped_code()), r"more than tensors \(.*mkdir\); it was not run"),
    "another zip": (write(zip_without_pickle()), "damaged"),
    "a list": (lambda s: torch.save([torch.zeros(1)], s / "adapter_model.bin"), "no table of tensors"),
    "another adapter": (
        lambda s: torch.save({"base_model.model.lora_A.weight": torch.zeros(1)}, s / "adapter_model.bin"),
        "not a checkpoint of the authors' code.*base_model.model.lora_A.weight",
    ),
    "no tensors": (lambda s: torch.save({}, s / "adapter_model.bin"), "it has 0: none"),
    "another strategy": (lambda s: change_settings(s, routing_strategy="top-p"), "routing_strategy='top-p'"),
    "first layer missing": (drop("layers.0."), "has no tensors of layer 0, but of layer 1"),
    "expert missing": (drop("layers.1.experts.3."), r"has no mixlora\.layers\.1\.experts\.3\.w1_proj"),
    "theta missing": (drop("layers.1.gate.theta"), r"has no mixlora\.layers\.1\.gate\.theta"),
    "no first expert": (drop("experts.0"), "has no matrix"),
    "one expert more": (put(f"{FIRST}.experts.8.w1_proj.lora_A.weight", torch.zeros(2, 64)), "cannot|can be"),
    "shape": (put(f"{FIRST}.experts.2.w2_proj.lora_A.weight", torch.zeros(2, 64)), r"\[2, 64\], expected \[2, 172\]"),
    "flat attention": (put(f"{FIRST}.self_attn.q_proj.lora_A.weight", torch.zeros(2)), "expected"),
    "flat router": (put(f"{FIRST}.gate.mlp.weight", torch.zeros(2)), "has no matrix"),
    "not finite": (put(f"{FIRST}.gate.lamb", torch.tensor(torch.nan)), "not finite"),
    "other rank": (lambda s: change_settings(s, r=4), "says r=4, but .* holds 2"),
    "other number of experts": (lambda s: change_settings(s, num_experts=16), "num_experts=16"),
    "no alpha": (lambda s: change_settings(s, lora_alpha=None), "has no 'lora_alpha'"),
    "alpha is text": (lambda s: change_settings(s, lora_alpha="4"), "lora_alpha='4'"),
    "base is a number": (lambda s: change_settings(s, base_model_name_or_path=7), "no name"),
    "top_k too large": (lambda s: change_settings(s, top_k=9), "top_k=9"),
}  # fmt: skip


@pytest.mark.parametrize(("damage", "message"), BROKEN.values(), ids=BROKEN)
def test_one_line_about_a_checkpoint_that_cannot_be_imported(source, tmp_path, monkeypatch, damage, message):
    monkeypatch.chdir(tmp_path)
    damage(source)
    with pytest.raises(GraphLoraError, match=message) as raised:
        import_checkpoint(source, tmp_path / "adapter")
    assert "\n" not in str(raised.value)
    assert not (tmp_path / "adapter").exists()
    assert not (tmp_path / "made-by-the-pickle").exists()


def matrices(**changes):
    tensors = {f"layers.{i}.adjacency": torch.zeros(8, 8) for i in range(2)}
    return {k.replace("_", "."): v for k, v in (tensors | changes).items()}


ASYMMETRIC = torch.eye(8).roll(1, dims=1)
GRAPHS = {
    "missing expert": ([[0, 8]], "experts are numbered 0 to 7"),
    "self-loop": ([[3, 3]], "to itself"),
    "triples": ([[1, 2, 3]], "not a list of expert pairs"),
    "missing layer": ({"0": []}, "one per layer: 0 to 1"),
    "text": ("edges", "one per layer"),
    "one matrix": ({"layers.0.adjacency": torch.zeros(8, 8)}, "must hold layers.0.adjacency to layers.1"),
    "size": (matrices(layers_1_adjacency=torch.zeros(7, 7)), r"shape \[7, 7\]"),
    "not symmetric": (matrices(layers_1_adjacency=ASYMMETRIC), "symmetric"),
    "not binary": (matrices(layers_1_adjacency=torch.full((8, 8), 0.5)), "zeros and ones"),
    "token alone": (matrices(layers_1_adjacency=torch.zeros(9, 9)), "token joined"),
}


@pytest.mark.parametrize(("content", "message"), GRAPHS.values(), ids=GRAPHS)
def test_one_line_about_a_graph_that_does_not_fit(tmp_path, content, message):
    tensors = isinstance(content, dict) and all(isinstance(v, torch.Tensor) for v in content.values())
    path = tmp_path / ("graph.safetensors" if tensors else "graph.json")
    if tensors:
        save_file(content, path)
    else:
        path.write_text(json.dumps(content))
    with pytest.raises(GraphLoraError, match=message):
        import_checkpoint(SOURCE, tmp_path / "adapter", graph=path)
    assert not (tmp_path / "adapter").exists()


@pytest.mark.parametrize("name", ["none.json", "none.safetensors"])
def test_graph_file_that_is_not_there_or_damaged(tmp_path, name):
    for _ in range(2):
        with pytest.raises(GraphLoraError, match=f"graph .*{name}"):
            import_checkpoint(SOURCE, tmp_path / "adapter", graph=tmp_path / name)
        (tmp_path / name).write_bytes(b"\xff\xfe")


def test_refuses_a_graph_for_linear_routers(source, tmp_path):
    make_linear(source)
    with pytest.raises(GraphLoraError, match="linear; leave it out"):
        import_checkpoint(source, tmp_path / "adapter", graph=[[0, 1]])


def test_refuses_another_base_model(tmp_path):
    base = tmp_path / "base"
    base.mkdir()
    settings = json.loads((BASE / "config.json").read_text())
    (base / "config.json").write_text(json.dumps(settings | {"num_hidden_layers": 3}))
    with pytest.raises(GraphLoraError, match="num_hidden_layers is 2 in the checkpoint and 3 in the model"):
        import_checkpoint(SOURCE, tmp_path / "adapter", base_model=str(base))


@pytest.mark.parametrize(("content", "message"), [("[]", "no JSON object"), ("{", "is broken")])
def test_broken_configuration_of_the_base_model(tmp_path, content, message):
    (tmp_path / "config.json").write_text(content)
    with pytest.raises(GraphLoraError, match=message):
        import_checkpoint(SOURCE, tmp_path / "adapter", base_model=str(tmp_path))


def test_leaves_files_that_are_there_alone(tmp_path):
    (tmp_path / "mine.txt").write_text("kept")
    with pytest.raises(GraphLoraError, match="not empty"):
        import_checkpoint(SOURCE, tmp_path)
    with pytest.raises(GraphLoraError, match="not empty"):
        import_checkpoint(SOURCE, tmp_path / "mine.txt")
    with pytest.raises(GraphLoraError, match="cannot write"):
        import_checkpoint(SOURCE, tmp_path / "mine.txt" / "adapter")
    assert (tmp_path / "mine.txt").read_text() == "kept"
