"""GraphLoraConfig: values, presets, and one clear message per mistake."""

import copy
import json
import pickle

import pytest
from peft import PeftConfig, PeftType

from graphlora import GraphLoraConfig
from graphlora.errors import GraphLoraError
from graphlora.tuner.presets import PRESETS

MISTAKES = {
    "one expert": (
        {"num_experts": 1},
        "top_k=2 is larger than num_experts=1",
        "choose top_k=1, or more experts",
    ),
    "top_k": ({"top_k": 9, "num_experts": 8}, "top_k=9 is larger than num_experts=8", "between 1 and 8"),
    "top_k_zero": ({"top_k": 0}, "top_k=0", "from 1"),
    "num_experts": ({"num_experts": 10**6}, "num_experts=1000000", "to 1024"),
    "num_experts_type": ({"num_experts": "eight"}, "num_experts='eight'", "whole number"),
    "num_experts_bool": ({"num_experts": True, "top_k": 1}, "num_experts=True", "whole number"),
    "rank": ({"r": 0}, "r=0", "from 1"),
    "density": ({"edge_density": 1.2}, "edge_density=1.2", "from 0 to 1"),
    "density_nan": ({"edge_density": float("nan")}, "edge_density=nan", "from 0 to 1"),
    "dropout": ({"lora_dropout": 1.0}, "lora_dropout=1.0", "from 0 to 0.999"),
    "alpha": ({"lora_alpha": -1}, "lora_alpha=-1", "from"),
    "coefficient": ({"router_normal_loss_coef": -0.1}, "router_normal_loss_coef=-0.1", "from 0"),
    "preset": ({"preset": "papers"}, "preset='papers'", "Did you mean 'paper'?"),
    "granularity": ({"expert_granularity": "layer"}, "expert_granularity='layer'", "'ffn', 'linear'"),
    "router": ({"router_type": "graf"}, "router_type='graf'", "Did you mean 'graph'?"),
    "conv": ({"router_conv": "gin"}, "router_conv='gin'", "'gcn'"),
    "edge_init": ({"edge_init": "rnig"}, "edge_init='rnig'", "Did you mean 'ring'?"),
    "edges_missing": ({"edges": [[0, 8]]}, "[0, 8]", "0 to 7"),
    "edges_self": ({"edges": [[3, 3]]}, "[3, 3]", "itself"),
    "edges_triple": ({"edges": [[0, 1, 2]]}, "[0, 1, 2]", "pair"),
    "norm": ({"norm_topk_prob": False}, "norm_topk_prob=False", "expert_granularity='linear'"),
    "backend": ({"backend": "cuda"}, "backend='cuda'", "'eager'"),
    "all_linear": ({"target_modules": "all-linear"}, "target_modules='all-linear'", "['mlp']"),
    "all_linear_attention": (
        {"attention_target_modules": "all-linear"},
        "attention_target_modules='all-linear'",
        "leave it out",
    ),
    "regex_layers": ({"target_modules": ".*mlp", "layers_to_transform": [0]}, "layers_to_transform", "list"),
    "pattern_layers": ({"layers_pattern": "h"}, "layers_pattern='h'", "layers_to_transform"),
    "num_experts_pattern": ({"num_experts_pattern": {"mlp": 1}}, "num_experts_pattern=1", "from 2"),
    "rank_pattern": ({"rank_pattern": {"mlp": 0}}, "rank_pattern=0", "from 1"),
    "alpha_pattern": ({"alpha_pattern": {"mlp": 0}}, "alpha_pattern=0", "from"),
    "decay": ({"load_decay": 1.0}, "load_decay=1.0", "from 0"),
    "seed": ({"graph_seed": -1}, "graph_seed=-1", "from 0"),
}


@pytest.mark.parametrize("mistake", MISTAKES)
def test_a_mistake_is_named_with_its_remedy_in_one_line(mistake):
    values, *parts = MISTAKES[mistake]
    with pytest.raises(GraphLoraError) as caught:
        GraphLoraConfig(**values)
    message = str(caught.value)
    assert "\n" not in message
    assert all(part in message for part in parts), message
    assert isinstance(caught.value, ValueError)


@pytest.mark.parametrize("preset", PRESETS)
def test_fields_left_out_come_from_the_preset(preset):
    config = GraphLoraConfig(preset=preset)
    expected = {
        name: set(value) if name.endswith("target_modules") and value is not None else value
        for name, value in PRESETS[preset].items()
    }
    assert {name: getattr(config, name) for name in expected} == expected


def test_a_given_value_wins_over_the_preset():
    config = GraphLoraConfig(preset="released", edge_density=0.5, router_normal_loss_coef=0.0)
    assert (config.edge_density, config.router_normal_loss_coef) == (0.5, 0.0)
    assert config.divergence == "abs_log_ratio"


def test_survives_saving_copying_and_pickling(tmp_path):
    config = GraphLoraConfig(
        preset="paper",
        task_type="CAUSAL_LM",
        target_modules=["mlp"],
        attention_target_modules=["k_proj", "q_proj"],
        exclude_modules=["layers.0.mlp"],
        edges=[(0, 1), (2, 3)],
        rank_pattern={"mlp": 4},
    )
    config.save_pretrained(tmp_path)
    saved = json.loads((tmp_path / "adapter_config.json").read_text())
    assert saved["peft_type"] == "GRAPHLORA"
    assert saved["attention_target_modules"] == ["k_proj", "q_proj"]
    others = [
        PeftConfig.from_pretrained(tmp_path),
        GraphLoraConfig.from_pretrained(tmp_path),
        GraphLoraConfig(**saved),
        copy.deepcopy(config),
        pickle.loads(pickle.dumps(config)),
    ]
    for other in others:
        assert type(other) is GraphLoraConfig
        assert other.peft_type is PeftType.GRAPHLORA
        assert other.to_dict() == {**config.to_dict(), "inference_mode": other.inference_mode}
        assert other.target_modules == {"mlp"}


def test_the_type_stands_beside_pefts_own():
    assert PeftType("GRAPHLORA") is PeftType.GRAPHLORA
    assert "GRAPHLORA" in PeftType.__members__
    assert PeftType.GRAPHLORA in list(PeftType)
    assert pickle.loads(pickle.dumps(PeftType.GRAPHLORA)) is PeftType.GRAPHLORA
    assert json.dumps(PeftType.GRAPHLORA) == '"GRAPHLORA"'


def test_values_of_an_untrusted_file_are_bounded(tmp_path):
    config = GraphLoraConfig()
    config.save_pretrained(tmp_path)
    path = tmp_path / "adapter_config.json"
    values = json.loads(path.read_text())
    path.write_text(json.dumps({**values, "router_hidden_size": 10**9}))
    with pytest.raises(GraphLoraError, match="router_hidden_size=1000000000"):
        PeftConfig.from_pretrained(tmp_path)


HOSTILE = {
    "experts": ({"num_experts": 10**9}, "num_experts=1000000000"),
    "rank beyond floats": ({"lora_alpha": 10**400}, "lora_alpha=1000"),
    "not a number": ({"lora_alpha": float("nan")}, "lora_alpha=nan"),
    "all together": ({"num_experts": 1024, "r": 4096}, "num_experts times r may be at most 65536"),
    "by pattern": ({"num_experts_pattern": {"mlp": 1000}, "r": 100}, "1000 experts of rank 100"),
    "a list": ({"preset": []}, r"preset=\[\]"),
    "lists of lists": ({"target_modules": [["mlp"]]}, "target_modules=.* must be of type"),
    "null": ({"norm_topk_prob": None}, "norm_topk_prob=None must be of type bool"),
    "endless expression": ({"target_modules": "(a+)+$"}, "may take forever"),
    "many repeats": ({"exclude_modules": ".*" * 7}, "may take forever"),
    "broken expression": ({"rank_pattern": {"(": 4}}, "is no regular expression"),
    "repeats beyond counting": ({"layers_pattern": "a{99999999999}", "layers_to_transform": 0}, "no regular expr"),
    "long text": ({"base_model_name_or_path": "x" * 1001}, "text of 1001 characters"),
    "terminal": ({"base_model_name_or_path": "\x1b[2J"}, "not printable"),
    "many entries": ({"target_modules": [str(i) for i in range(10_001)]}, "10001 entries"),
    "edges again and again": ({"edges": [[0, 1]] * 65}, "edges lists 65 pairs of 8 experts"),
    "python's own names": ({"ffn_modules": {"up_proj": "__class__", "down_proj": "b"}}, "not the name of a module"),
    "no part of an FFN": ({"ffn_modules": {"forward": "b"}}, "must name down_proj and up_proj"),
    "library by path": ({"auto_mapping": {"parent_library": "/tmp/x"}}, "not the name of a library"),
    "layer": ({"layers_to_transform": [10**9]}, "layers_to_transform names 1000000000"),
    "task": ({"task_type": ["CAUSAL_LM"]}, "task_type=.* is unknown"),
}  # fmt: skip


@pytest.mark.parametrize(("values", "message"), HOSTILE.values(), ids=HOSTILE)
def test_a_file_cannot_ask_for_everything(values, message, tmp_path):
    with pytest.raises(GraphLoraError, match=message):
        GraphLoraConfig(**values)
    text = json.dumps({"peft_type": "GRAPHLORA"} | values)
    (tmp_path / "adapter_config.json").write_text(text)
    with pytest.raises(GraphLoraError, match=message):
        GraphLoraConfig.from_pretrained(str(tmp_path))


def test_another_methods_file_is_told(tmp_path):
    (tmp_path / "adapter_config.json").write_text('{"peft_type": "LORA", "r": 8}')
    with pytest.raises(GraphLoraError, match="peft_type='LORA' is another method"):
        GraphLoraConfig.from_pretrained(str(tmp_path))
