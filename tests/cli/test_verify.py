"""`graphlora verify`: every changed byte, another base, another output; and what cannot be checked says why."""

import json
import shutil
from pathlib import Path

import pytest
import torch
from peft import PeftModel
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM

from graphlora.training.manifest import HASHED, MANIFEST_FILE

WEIGHTS, CONFIG = "adapter_model.safetensors", "adapter_config.json"


@pytest.fixture
def copy(adapter, tmp_path):
    """A copy of the trained adapter, to be tampered with."""
    shutil.copytree(adapter, tmp_path / "copy", ignore=shutil.ignore_patterns("checkpoints"))
    return tmp_path / "copy"


@pytest.fixture
def verify(graphlora):
    def run(*words):
        code, out, last = graphlora("verify", *words, "--device", "cpu", "--json")
        return code, json.loads(out) if out else last

    return run


def flip(path: Path, position: int) -> None:
    content = bytearray(path.read_bytes())
    content[position] ^= 1
    path.write_bytes(bytes(content))


def changed(path: Path, **values) -> None:
    path.write_text(json.dumps(json.loads(path.read_text()) | values))


def test_a_trained_adapter_verifies_bit_for_bit(adapter, verify):
    code, facts = verify(adapter)
    assert code == 0
    assert facts["verified"]
    assert facts["files"] == dict.fromkeys(HASHED, "as recorded")
    assert facts["base"]["state"] == "as recorded"
    assert facts["output"]["state"] == "exact"


def test_another_process_computes_the_same_output(adapter, command):
    done = command("verify", adapter, "--device", "cpu")
    assert done.returncode == 0, done.stderr
    assert "  output" in done.stdout
    assert done.stdout.endswith("\nverified\n")


@pytest.mark.parametrize("name", HASHED)
@pytest.mark.parametrize("place", [0, 0.5, -1])
def test_one_changed_bit_of_any_file_is_found_and_nothing_is_loaded(copy, verify, name, place):
    path = copy / name
    flip(path, int(place * path.stat().st_size) if place >= 0 else -1)
    code, facts = verify(copy)
    assert code == 1
    assert facts["files"].pop(name) == "changed"
    assert set(facts["files"].values()) == {"as recorded"}
    assert "base" not in facts


def test_a_lost_file_is_named_with_the_remedy(copy, graphlora):
    (copy / WEIGHTS).unlink()
    code, out, _ = graphlora("verify", copy)
    assert code == 1
    assert f"{WEIGHTS}  MISSING" in out
    assert f"restore {WEIGHTS}" in out


def test_another_adapters_files_are_found(copy, verify, train_words, graphlora, tmp_path):
    assert graphlora(*train_words, "--seed", 1, "--output_dir", tmp_path / "other")[0] == 0
    for name in HASHED:
        shutil.copy(tmp_path / "other" / name, copy / name)
    code, facts = verify(copy)
    assert code == 1
    assert facts["files"][WEIGHTS] == "changed"


def test_a_base_of_another_shape_is_named(adapter, other_model, verify):
    for words in ([], ["--skip_output"]):
        code, facts = verify(adapter, "--base_model", other_model, *words)
        assert code == 1
        assert facts["base"]["state"] == "CHANGED"
        assert "hidden_size 48, recorded 32" in facts["base"]["detail"]


@pytest.fixture
def changed_base(tiny_model, tmp_path):
    """Copy of the base whose weights were changed by a function."""

    def make(change):
        folder = tmp_path / "base"
        shutil.copytree(tiny_model, folder)
        weights = load_file(folder / "model.safetensors")
        change(weights)
        save_file(weights, folder / "model.safetensors", {"format": "pt"})
        return folder

    return make


def test_a_base_of_other_weights_is_found(adapter, changed_base, verify):
    def continued_training(weights):
        for value in weights.values():
            value += 1e-4

    code, facts = verify(adapter, "--base_model", changed_base(continued_training))
    assert code == 1
    assert facts["base"]["state"] == "as recorded"
    assert facts["output"]["state"] == "CHANGED"
    assert "other weights" in facts["output"]["detail"]


def recorded(adapter: Path) -> dict:
    return json.loads((adapter / MANIFEST_FILE).read_text())["output"]


@pytest.mark.parametrize(("shift", "state", "code"), [(1e-5, "within tolerance", 0), (0.5, "different", 1)])
def test_an_output_that_moved_is_measured(copy, verify, shift, state, code):
    output = recorded(copy)
    text = output["texts"][1]
    text["top_logits"][2][0] += shift * text["std"][2]
    text["logits_sha256"] = "0" * 64
    changed(copy / MANIFEST_FILE, output=output)
    found, facts = verify(copy)
    assert found == code
    assert facts["output"]["state"] == state


def test_a_changed_tokenizer_is_found(adapter, tiny_model, verify, tmp_path):
    folder = shutil.copytree(tiny_model, tmp_path / "base")
    path = folder / "tokenizer.json"
    values = json.loads(path.read_text())
    values["pre_tokenizer"] = {"type": "Whitespace"}
    values["normalizer"] = {"type": "Lowercase"}
    values["model"]["vocab"] = dict(
        zip(values["model"]["vocab"], reversed(values["model"]["vocab"].values()), strict=True)
    )
    path.write_text(json.dumps(values))
    code, facts = verify(adapter, "--base_model", folder)
    assert code == 1
    assert "tokenizer" in facts["output"]["detail"]


def test_an_adapter_from_elsewhere_gets_a_message_and_can_be_recorded(copy, graphlora, verify):
    (copy / MANIFEST_FILE).unlink()
    code, _, last = graphlora("verify", copy)
    assert code == 2
    assert "has no manifest.json" in last
    assert "--record" in last
    for name in ("record.json", "config.yaml"):
        (copy / name).unlink()
    assert graphlora("verify", copy, "--record", "--device", "cpu", "--dtype", "float32")[0] == 0
    code, facts = verify(copy)
    assert code == 0
    assert facts["files"] == {CONFIG: "as recorded", WEIGHTS: "as recorded"}
    assert facts["output"]["state"] == "exact"


def test_an_adapter_that_peft_saved_is_recorded_too(tiny_model, tmp_path, graphlora, verify):
    from peft import LoraConfig, get_peft_model

    torch.manual_seed(0)
    model = get_peft_model(
        AutoModelForCausalLM.from_pretrained(tiny_model), LoraConfig(target_modules=["q_proj"])
    )
    model.save_pretrained(tmp_path / "lora")
    assert graphlora("verify", tmp_path / "lora", "--record", "--device", "cpu", "--dtype", "float32")[0] == 0
    assert verify(tmp_path / "lora")[0] == 0


@pytest.mark.parametrize(
    ("text", "piece"),
    [
        ("", "no manifest"),
        ("[" * 100_000, "no manifest"),
        ("[]", "schema_version is None"),
        ('{"schema_version": 2}', "schema_version is 2"),
        ('{"schema_version": 1, "created": "now", "files": {}, "base_config": {}}', "does not name"),
        ('{"schema_version": 1, "created": "now", "files": {"../x": "0"}, "base_config": {}}', "'../x'"),
        ('{"schema_version": 1, "created": "now", "files": [], "base_config": {}}', "files is"),
        ('{"schema_version": 1, "created": "now", "files": {}, "base_config": {}, "more": 1}', "more is"),
    ],
)
def test_a_broken_manifest_is_one_line(copy, graphlora, text, piece):
    (copy / MANIFEST_FILE).write_text(text)
    code, _, last = graphlora("verify", copy)
    assert code == 2
    assert piece in last
    assert MANIFEST_FILE in last


@pytest.mark.parametrize(
    "output", [{}, {"dtype": "float32"}, {"dtype": "float32", "texts": [1, 2]}, {"dtype": "torch.load"}]
)
def test_a_broken_output_is_one_line(copy, graphlora, output):
    changed(copy / MANIFEST_FILE, output=output)
    code, _, last = graphlora("verify", copy, "--device", "cpu")
    assert code == 2
    assert "--skip_output" in last


def test_without_the_base_model_the_hashes_are_still_checked(copy, graphlora, tmp_path):
    missing = tmp_path / "missing"
    code, _, last = graphlora("verify", copy, "--base_model", missing)
    assert code == 2
    assert "--skip_output" in last
    code, out, _ = graphlora("verify", copy, "--base_model", missing, "--skip_output")
    assert code == 0
    assert "not checked" in out


def test_no_directory_is_a_mistake(graphlora, tmp_path):
    code, _, last = graphlora("verify", tmp_path / "nowhere")
    assert code == 2
    assert "no adapter directory" in last


def test_what_was_recorded_is_what_the_saved_adapter_computes(adapter, tiny_model):
    """The recorded logits, from PEFT alone."""
    model = PeftModel.from_pretrained(AutoModelForCausalLM.from_pretrained(tiny_model), adapter).eval()
    for text in recorded(adapter)["texts"]:
        with torch.no_grad():
            logits = model(input_ids=torch.tensor([text["token_ids"]])).logits[0]
        torch.testing.assert_close(
            logits.topk(5).values, torch.tensor(text["top_logits"]), rtol=1e-5, atol=1e-6
        )
