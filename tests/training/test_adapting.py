"""Modules that a recipe names, as a command line and a recipe have them."""

import warnings

import pytest
from tiny_llama import make_base
from transformers import MixtralConfig, MixtralForCausalLM

from graphlora.errors import GraphLoraError
from graphlora.training import Recipe
from graphlora.training.adapting import adapter_config, add_adapter


def recipe_of(method="lora", **options):
    return Recipe.from_dict(
        {"model": "m", "task": "quiz", "output_dir": "o", "method": method, "r": 2, **options}
    )


def adapted(**options):
    """Names of the modules that got LoRA, without layers; nothing may warn."""
    with warnings.catch_warnings():
        warnings.simplefilter("error", UserWarning)
        model = add_adapter(make_base(), recipe_of(**options))
    paths = [path for path, module in model.get_base_model().named_modules() if hasattr(module, "lora_A")]
    return {path.split(".", 3)[3] for path in paths}


@pytest.mark.parametrize(
    "given",
    [
        *("q_proj,v_proj", "q_proj, v_proj", "q_proj v_proj", "q_proj,v_proj,", ["q_proj", "v_proj"]),
        *(r".*self_attn\.(q|v)_proj", r"model\.layers\.\d\.self_attn\.[qv]_proj"),
    ],
)
def test_names_and_expressions(given):
    assert adapted(target_modules=given) == {"self_attn.q_proj", "self_attn.v_proj"}


def test_one_name():
    assert (
        adapted(target_modules="q_proj") == adapted(target_modules="self_attn.q_proj") == {"self_attn.q_proj"}
    )
    assert adapted(target_modules="q_proj,") == {"self_attn.q_proj"}
    assert "self_attn.q_proj" not in adapted(exclude_modules="q_proj") and adapted(exclude_modules="q_proj")


@pytest.mark.parametrize(
    "given", ["model.layers.0.self_attn.._proj", "model.layers.0.self_attn.q_proj", "all-linear"]
)
def test_what_works_as_an_expression_stays_one(given):
    assert adapter_config(recipe_of(target_modules=given)).target_modules == given
    assert adapted(target_modules=given)


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


@pytest.mark.parametrize(
    ("method", "option"),
    [("lora", "target_modules"), ("graphlora", "target_modules"), ("graphlora", "attention_target_modules")],
)
def test_a_misspelled_name_beside_a_right_one_is_told(method, option):
    right = "mlp" if (method, option) == ("graphlora", "target_modules") else "q_proj"
    with pytest.warns(UserWarning, match=f"{option} names x{right}, which.*did you mean '{right}'"):
        add_adapter(make_base(), recipe_of(method, **{option: f"{right},x{right}"}))


def test_names_that_peft_translates_are_known():
    config = MixtralConfig(
        vocab_size=32, hidden_size=16, intermediate_size=32, num_hidden_layers=1, num_attention_heads=2,
        num_key_value_heads=1, num_local_experts=2, pad_token_id=0,
    )  # fmt: skip
    model = MixtralForCausalLM(config)
    with warnings.catch_warnings(record=True) as seen:
        warnings.simplefilter("always")
        made = add_adapter(model, recipe_of(target_modules=["q_proj", "w1", "w2", "w3"]))
    assert not [w for w in seen if "names" in str(w.message)]
    assert any("experts" in name and "lora" in name for name, _ in made.named_parameters())


@pytest.mark.parametrize("given", [r"nothing\..*", "nothing", "nothing,naught"])
def test_what_matches_nothing_is_an_error(given):
    with pytest.raises(GraphLoraError, match=r"cannot adapt the model.*not found"):
        add_adapter(make_base(), recipe_of(target_modules=given))
