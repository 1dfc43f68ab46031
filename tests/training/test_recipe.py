"""Recipes: typed, checked, round through YAML."""

import subprocess
import sys
from dataclasses import fields

import pytest
from transformers import TrainingArguments

from graphlora.errors import GraphLoraError
from graphlora.training import Recipe
from graphlora.training.arguments import SAME_NAME
from graphlora.training.suggestion import ELSEWHERE

NEEDED = {"model": "m", "task": "quiz", "output_dir": "out"}


def test_yaml_round_trip_keeps_every_option(tmp_path):
    recipe = Recipe.from_dict(
        NEEDED
        | {
            "task": {"arc_easy": 2, "boolq": 0.5},
            "learning_rate": "1e-4",
            "edges": [[0, 1]],
            "report_to": ["tensorboard"],
            "training_args": {"dataloader_num_workers": 2},
            "adapter_args": {"load_decay": 0.5},
        }
    )
    path = tmp_path / "recipe.yaml"
    path.write_text(recipe.to_yaml())
    assert Recipe.from_yaml(path) == recipe
    assert recipe.learning_rate == 1e-4


@pytest.mark.parametrize(
    ("values", "message"),
    [
        ({"learnin_rate": 1}, "unknown recipe option 'learnin_rate'; did you mean 'learning_rate'"),
        ({"model_name_or_path": "m"}, "unknown recipe option 'model_name_or_path'; did you mean 'model'"),
        ({"learning_rate": "fast"}, "learning_rate is 'fast'; expected float"),
        ({"learning_rate": -1}, "learning_rate is -1.0; give a number above 0"),
        ({"learning_rate": float("nan")}, "learning_rate is nan"),
        ({"weight_decay": -0.1}, "weight_decay is -0.1; give 0 or more"),
        ({"scoring": "clozed"}, "scoring is 'clozed'; expected Literal"),
        ({"bf16": True, "fp16": True}, "bf16 and fp16"),
        ({"warmup_ratio": 1.5}, "warmup_ratio is 1.5"),
        ({"task": {}}, "each task of a mixture"),
        ({"task": {"boolq": 0}}, "each task of a mixture"),
        ({"eval_strategy": "no", "early_stopping_patience": 2}, "early_stopping_patience needs validation"),
        ({"eval_steps": 10, "save_steps": 15}, "save_steps is 15, not a multiple of eval_steps (10)"),
        (
            {"save_steps": 8},
            "save_steps is 8, a number of steps, and eval_steps is 0.2, a share of all steps",
        ),
        ({"eval_steps": 8, "save_steps": 0.5}, "set eval_steps to 0.5 too"),
        ({"model": None}, "the recipe has no model"),
    ],
)
def test_mistakes_are_named(values, message):
    with pytest.raises(GraphLoraError) as raised:
        Recipe.from_dict(NEEDED | values)
    assert message in str(raised.value)
    assert "\n" not in str(raised.value)


def test_broken_yaml_names_file_and_line(tmp_path):
    path = tmp_path / "recipe.yaml"
    path.write_text("model: m\ntask: [1\nx: 2")
    with pytest.raises(GraphLoraError, match=r"recipe.yaml:3: broken YAML"):
        Recipe.from_yaml(path)
    path.write_text("only words")
    with pytest.raises(GraphLoraError, match="holds no recipe"):
        Recipe.from_yaml(path)
    with pytest.raises(GraphLoraError, match="No such file"):
        Recipe.from_yaml(tmp_path / "missing.yaml")


def test_only_given_adapter_options_reach_the_adapter():
    recipe = Recipe.from_dict(NEEDED | {"r": 4, "adapter_args": {"load_decay": 0.5}})
    assert recipe.adapter_options() == {"r": 4, "load_decay": 0.5}


def test_names_are_those_of_training_arguments():
    known = set(TrainingArguments.__dataclass_fields__)
    assert set(SAME_NAME) <= known


def test_adapter_options_are_those_of_the_config():
    from dataclasses import fields

    from peft import LoraConfig

    from graphlora import GraphLoraConfig

    names = {item.name for item in fields(Recipe) if item.metadata["group"] == "adapter"} - {"adapter_args"}
    assert names - {"use_dora", "use_rslora"} <= set(GraphLoraConfig.__dataclass_fields__)
    assert {"use_dora", "use_rslora"} <= set(LoraConfig.__dataclass_fields__)


def test_reading_a_recipe_needs_no_torch():
    code = "import sys; from graphlora.training import Recipe; assert 'torch' not in sys.modules"
    subprocess.run([sys.executable, "-c", code], check=True)


def test_names_of_other_tools_lead_to_options_that_exist_and_none_is_one():
    options = {item.name for item in fields(Recipe)}
    assert set(ELSEWHERE.values()) <= options | {"resume"}
    assert not options & set(ELSEWHERE)
