"""Models and adapters that cannot be loaded say so in one line."""

import json
import shutil

import pytest
import torch
from peft import LoraConfig, get_peft_model
from transformers import AutoModelForCausalLM

from graphlora.errors import GraphLoraError
from graphlora.training.adapter_files import read_adapter
from graphlora.training.loading import (
    load_adapter,
    load_base_model,
    load_config,
    load_for_use,
    load_tokenizer,
    pick_device,
    pick_dtype,
)


@pytest.fixture(scope="module")
def adapter(tiny_model, tmp_path_factory):
    folder = tmp_path_factory.mktemp("adapter")
    model = get_peft_model(
        AutoModelForCausalLM.from_pretrained(tiny_model),
        LoraConfig(task_type="CAUSAL_LM", target_modules="all-linear"),
    )
    model.save_pretrained(folder)
    return folder


@pytest.fixture
def broken(adapter, tmp_path):
    return shutil.copytree(adapter, tmp_path / "adapter")


def refused(call, *parts):
    with pytest.raises(GraphLoraError) as raised:
        call()
    for part in parts:
        assert str(part) in str(raised.value)
    assert "\n" not in str(raised.value)


def test_an_adapter_comes_with_its_base(adapter, tiny_model):
    model, tokenizer, files = load_for_use(str(adapter), None, "float32", "cpu")
    assert files is not None
    assert files.base_model == str(tiny_model)
    assert not model.training
    assert tokenizer.pad_token == "<|pad|>"
    assert load_for_use(str(tiny_model), None, "float32", "cpu")[2] is None


@pytest.mark.parametrize("name", ["/nowhere/model", "./model", "no-such/model", "gpt-nothing"])
def test_unknown_models_are_named(name):
    refused(lambda: load_base_model(name, torch.float32), name)
    refused(lambda: load_tokenizer(name), name)


@pytest.mark.parametrize("load", [load_config, load_tokenizer])
def test_a_folder_without_a_model_is_named(load, tmp_path):
    (tmp_path / "tokenizer_config.json").write_text("{}")
    refused(
        lambda: load(str(tmp_path)), f"no model in {tmp_path}: the folder has no config.json; check the path"
    )


def test_a_name_without_a_network_may_be_a_wrong_path():
    refused(lambda: load_config("no-such/model"), "no such directory either; check the name or the network")


def test_a_message_that_ends_in_a_colon_is_shown_whole(tiny_model, tmp_path):
    shutil.copy(tiny_model / "config.json", tmp_path)
    refused(
        lambda: load_tokenizer(str(tmp_path)),
        f"cannot load model {tmp_path}: ",
        "tokenizer from one of: (1) ",
    )


def test_a_directory_without_a_model_is_named(tmp_path):
    refused(lambda: load_base_model(str(tmp_path), torch.float32), tmp_path)
    for name in ("a.gguf", "b.gguf"):
        (tmp_path / name).touch()
    refused(lambda: load_base_model(str(tmp_path), torch.float32), "several .gguf files (a.gguf, b.gguf)")


def test_damaged_base_weights_are_named(tiny_model, tmp_path):
    copy = shutil.copytree(tiny_model, tmp_path / "model")
    weights = copy / "model.safetensors"
    weights.write_bytes(weights.read_bytes()[:1000])
    refused(lambda: load_base_model(str(copy), torch.float32), copy, "truncated or damaged")


def test_an_adapter_of_another_size_is_refused(adapter, other_model):
    base = load_base_model(str(other_model), torch.float32)
    refused(lambda: load_adapter(base, adapter), "does not fit", "size mismatch", "it was trained on")


def test_an_adapter_of_a_deeper_model_is_refused(adapter, tiny_model):
    base = load_base_model(str(tiny_model), torch.float32)
    del base.model.layers[1]
    refused(lambda: load_adapter(base, adapter), "no module model.layers.1.")


def test_missing_files_are_named(broken, tmp_path):
    (broken / "adapter_model.safetensors").unlink()
    refused(lambda: read_adapter(broken), "has no adapter_model.safetensors")
    refused(lambda: read_adapter(tmp_path / "nothing"), "no adapter directory")


@pytest.mark.parametrize("change", [lambda b: b[: len(b) // 2], lambda b: b"\xff" * 8 + b[8:], lambda b: b""])
def test_truncated_and_tampered_weights_are_named(broken, change):
    weights = broken / "adapter_model.safetensors"
    weights.write_bytes(change(weights.read_bytes()))
    refused(lambda: read_adapter(broken), weights, "truncated or damaged")


def test_a_broken_config_is_named(broken):
    (broken / "adapter_config.json").write_text("{")
    refused(lambda: read_adapter(broken), "adapter_config.json is broken")
    (broken / "adapter_config.json").write_text(json.dumps({"r": 1}))
    refused(lambda: read_adapter(broken), "names no peft_type")


def test_dtypes_and_devices():
    cpu = torch.device("cpu")
    assert pick_dtype("bfloat16", cpu) == torch.bfloat16
    assert pick_dtype("auto", cpu) in (torch.float32, torch.bfloat16)
    refused(lambda: pick_dtype("float8", cpu), "float8")
    there = "cpu, cuda" if torch.cuda.is_available() else "cpu"
    refused(lambda: pick_device("warp"), f"'warp' is not available here; use {there} or auto")
