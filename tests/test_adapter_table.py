"""An adapter's configuration and tensors are checked against each other before anything is built or loaded."""

import json

import peft
import pytest
import torch
from peft import get_peft_model
from safetensors.torch import load_file, save_file
from tiny_llama import adapter_config, make_base

from graphlora import GraphLoraConfig
from graphlora.adapter_table import CONFIG_FILE, WEIGHTS_FILE, check_table, read_table
from graphlora.errors import GraphLoraError
from graphlora.training.adapter_files import read_adapter
from graphlora.tuner.presets import PRESETS

OPTIONS = [{"preset": preset} for preset in PRESETS] + [
    {"edge_init": "learned", "modules_to_save": ["lm_head"]},
    {"router_conv": "gat", "router_num_layers": 3, "num_experts": 1, "top_k": 1, "edge_init": "learned"},
    {"num_experts_pattern": {"layers.1.mlp": 6}, "rank_pattern": {"layers.0.mlp": 3}},
]


@pytest.fixture
def saved(tmp_path):
    def save(**options):
        torch.manual_seed(0)
        get_peft_model(make_base(), adapter_config(**options)).save_pretrained(tmp_path)
        return tmp_path

    return save


@pytest.mark.filterwarnings("ignore:.*expert graphs hold twins")
@pytest.mark.parametrize("options", OPTIONS, ids=str)
def test_every_adapter_that_we_write_fits(options, saved):
    folder = saved(**options)
    files = read_adapter(folder)
    assert files.shapes == {name: tuple(t.shape) for name, t in load_file(folder / WEIGHTS_FILE).items()}


def change_config(folder, **values):
    path = folder / CONFIG_FILE
    path.write_text(json.dumps(json.loads(path.read_text()) | values))


def change_tensors(folder, change):
    tensors = load_file(folder / WEIGHTS_FILE)
    change(tensors)
    save_file(tensors, folder / WEIGHTS_FILE)


BLOCK = "base_model.model.model.layers.1.mlp"
CONFIGS = {
    "experts": ({"num_experts": 512}, r"cumulative_weights has shape \[4\]; .* asks for \[512\]"),
    "rank": ({"r": 64}, r"has shape .*; adapter_config.json asks for \[.*64.*\]"),
    "router width": ({"router_hidden_size": 8000}, r"graphlora_router.* asks for .*8000"),
    "router layers": ({"router_num_layers": 16}, r"graphlora_router\.\w+ has shape \[2, 8, 8\]; .*\[16, 8, 8\]"),
}  # fmt: skip


@pytest.mark.parametrize(("values", "message"), CONFIGS.values(), ids=CONFIGS)
@pytest.mark.parametrize("load", [read_adapter, lambda f: peft.PeftModel.from_pretrained(make_base(), f)])
def test_a_configuration_that_asks_for_other_sizes_names_the_tensor(load, values, message, saved):
    folder = saved()
    change_config(folder, **values)
    with pytest.raises(GraphLoraError, match=message):
        load(folder)


def put(name, tensor):
    return lambda tensors: tensors.update({name: tensor})


TENSORS = {
    "another number of experts in one block": (
        put(f"{BLOCK}.graphlora_coordination.cumulative_weights", torch.zeros(5)),
        r"layers\.1\.mlp\.graphlora_coordination\.cumulative_weights has shape \[5\]; .* asks for \[4\]",
    ),
    "gates of other experts": (put(f"{BLOCK}.graphlora_router.edge_logits", torch.zeros(7)), r"asks for \[6\]"),
    "a scalar that is a matrix": (
        put(f"{BLOCK}.graphlora_coordination.poisson_rate_bias", torch.zeros(2, 2)), r"asks for \[\]"
    ),
    "nothing": (put(f"{BLOCK}.graphlora_up_proj.lora_A", torch.zeros(4, 2, 0)), "holds nothing"),
    "integers": (put(f"{BLOCK}.graphlora_router.out_proj", torch.zeros(8, dtype=torch.int64)), "dtype I64"),
    "a weight of the base": (put("base_model.model.model.norm.weight", torch.zeros(16)), "no tensor of a GraphLoRA"),
    "an unknown part": (put(f"{BLOCK}.graphlora_router.other", torch.zeros(1)), "no tensor of a GraphLoRA"),
    "nothing of ours": (lambda tensors: (tensors.clear(), tensors.update({"x": torch.zeros(1)})), "another file"),
}  # fmt: skip


@pytest.mark.parametrize(("change", "message"), TENSORS.values(), ids=TENSORS)
def test_a_tensor_that_does_not_fit_is_named(change, message, saved):
    folder = saved()
    change_tensors(folder, change)
    with pytest.raises(GraphLoraError, match=message):
        read_adapter(folder)


def test_lost_weights_of_a_trained_adapter_are_missed_before_the_hub_is_asked(saved):
    folder = saved()
    (folder / "adapter_model.safetensors").unlink()
    assert GraphLoraConfig.from_pretrained(str(folder)).num_experts == 4
    (folder / "manifest.json").write_text("{}")
    with pytest.raises(GraphLoraError, match=r"has no adapter_model\.safetensors, but the manifest"):
        peft.PeftModel.from_pretrained(make_base(), folder)


def test_a_head_that_says_it_is_huge_is_not_read(saved):
    folder = saved()
    path = folder / WEIGHTS_FILE
    path.write_bytes((2**40).to_bytes(8, "little") + path.read_bytes()[8:])
    with pytest.raises(GraphLoraError, match=r"truncated or damaged .* bytes long"):
        read_table(path)


def test_sizes_that_the_configuration_does_not_name_must_agree(saved):
    table = read_table(saved() / WEIGHTS_FILE)
    check_table(table, {"peft_type": "GRAPHLORA"})
    table.shapes[f"{BLOCK}.graphlora_coordination.cumulative_weights"] = (5,)
    with pytest.raises(GraphLoraError, match=r"layers\.1\.mlp\..* asks for \[5, r, any\]"):
        check_table(table, {"peft_type": "GRAPHLORA"})
