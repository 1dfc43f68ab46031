"""Modules that a recipe names, as a command line and a recipe have them."""

import pytest
from tiny_llama import make_base

from graphlora.errors import GraphLoraError
from graphlora.training import Recipe
from graphlora.training.adapting import adapter_config, add_adapter


def recipe_of(method="lora", **options):
    return Recipe.from_dict(
        {"model": "m", "task": "quiz", "output_dir": "o", "method": method, "r": 2, **options}
    )


def adapted(model):
    """Names of the modules that got an adapter, without layers."""
    paths = [path for path, module in model.get_base_model().named_modules() if hasattr(module, "lora_A")]
    return {path.split(".", 3)[3] for path in paths}


@pytest.mark.parametrize(
    "given", ["q_proj,v_proj", "q_proj, v_proj", ["q_proj", "v_proj"], r".*self_attn\.(q|v)_proj"]
)
def test_names_and_expressions(given):
    assert adapted(add_adapter(make_base(), recipe_of(target_modules=given))) == {
        "self_attn.q_proj",
        "self_attn.v_proj",
    }


def test_one_name():
    assert adapted(add_adapter(make_base(), recipe_of(target_modules="q_proj"))) == {"self_attn.q_proj"}
    assert adapter_config(recipe_of(target_modules="all-linear")).target_modules == "all-linear"
    rest = adapted(add_adapter(make_base(), recipe_of(exclude_modules="q_proj")))
    assert "self_attn.k_proj" in rest and "self_attn.q_proj" not in rest


def test_names_of_graphlora():
    options = {"target_modules": "mlp", "attention_target_modules": "q_proj"}
    config = adapter_config(recipe_of("graphlora", **options))
    assert set(config.target_modules) == {"mlp"} and set(config.attention_target_modules) == {"q_proj"}
    names = [
        name for name, _ in add_adapter(make_base(), recipe_of("graphlora", **options)).named_parameters()
    ]
    assert {
        name.split(".graphlora_attention")[0][-6:] for name in names if "graphlora_attention" in name
    } == {"q_proj"}


@pytest.mark.parametrize("method", ["lora", "graphlora"])
@pytest.mark.parametrize("option", ["target_modules", "attention_target_modules", "exclude_modules"])
def test_a_misspelled_name_is_an_error_even_beside_a_right_one(method, option):
    if (method, option) == ("lora", "attention_target_modules"):
        pytest.skip("not an option of LoRA")
    named = recipe_of(method, **{option: "q_proj,qproj"})
    blocks = (method, option) == ("graphlora", "target_modules")
    remedy = "leave it out" if blocks else "linear layers are called .*down_proj"
    with pytest.raises(GraphLoraError, match=rf"{option} names qproj.*q_proj.*{remedy}"):
        add_adapter(make_base(), named)


def test_an_expression_that_matches_nothing_is_an_error():
    with pytest.raises(GraphLoraError, match="cannot adapt the model"):
        add_adapter(make_base(), recipe_of(target_modules=r"nothing\..*"))
