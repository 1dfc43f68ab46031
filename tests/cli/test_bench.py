"""`graphlora bench` on a tiny model's config."""

import json

import pytest
import torch
from torch._dynamo.utils import counters


@pytest.fixture(scope="module")
def config_only(tiny_model, tmp_path_factory):
    """A directory with a config and nothing else."""
    folder = tmp_path_factory.mktemp("config")
    (folder / "config.json").write_text((tiny_model / "config.json").read_text())
    return folder


def test_bench_needs_the_config_alone_and_compares_three(graphlora, config_only):
    words = [
        "--length",
        16,
        "--batch_size",
        2,
        "--iterations",
        2,
        "--device",
        "cpu",
        "--num_experts",
        4,
        "--json",
    ]
    code, out, progress = graphlora(
        "bench", config_only, *words, "--adapter_args", '{"lora_alpha": 4}', "--check"
    )
    assert code == 0
    assert progress.startswith("GraphLoRA, whole model: 100%")
    facts = json.loads(out)
    assert facts["adapter"] == {"num_experts": 4, "lora_alpha": 4}
    assert set(facts["candidates"]) == {"frozen", "lora", "graphlora"}
    trained = {kind: values["predicted"]["trained"] for kind, values in facts["candidates"].items()}
    assert trained["frozen"] == 0 < trained["lora"] < trained["graphlora"]
    for values in facts["candidates"].values():
        assert values["predicted"]["peak"] == pytest.approx(values["measured"]["peak"], rel=0.3)


def test_bench_prints_a_table(graphlora, config_only):
    code, out, _ = graphlora("bench", config_only, "--length", 8, "--iterations", 1, "--device", "cpu")
    assert code == 0
    assert "peak memory (GiB)" in out
    assert out.splitlines()[2].split() == ["frozen", "PEFT", "LoRA", "GraphLoRA"]


@pytest.mark.filterwarnings("ignore:.*should not be instantiated:DeprecationWarning")
@pytest.mark.filterwarnings("ignore:The .grad attribute of a Tensor that is not a leaf:UserWarning")
def test_compiled_steps_are_predicted_or_refused(graphlora, config_only, monkeypatch):
    words = ["--length", 8, "--batch_size", 1, "--iterations", 1, "--device", "cpu", "--step_mode", "compile"]
    monkeypatch.setattr("graphlora.cli.bench.COMPILER", "aot_eager")
    torch._dynamo.reset()
    counters.clear()
    code, out, _ = graphlora("bench", config_only, *words, "--check", "--json")
    assert code == 0
    assert counters["stats"]["unique_graphs"] > 0
    facts = json.loads(out)
    assert facts["step_mode"] == "compile"
    for values in facts["candidates"].values():
        assert values["predicted"]["peak"] == pytest.approx(values["measured"]["peak"], rel=0.3)

    def fails(graph, inputs):
        raise RuntimeError("no compiler")

    torch._dynamo.reset()
    torch._dynamo.register_backend(fails, name="fails_in_bench")
    monkeypatch.setattr("graphlora.cli.bench.COMPILER", "fails_in_bench")
    code, _, error = graphlora("bench", config_only, *words)
    assert code == 2
    assert "torch.compile failed (RuntimeError: no compiler); set --step_mode to eager" in error


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["--length", 4096], "takes 128 tokens"),
        (["--batch_size", 0], "--batch_size is 0"),
        (["--length", 8, "--adapter_args", '{"num_expert": 3}'], "did you mean 'num_experts'"),
    ],
)
def test_mistakes_are_one_line(graphlora, config_only, words, message):
    code, _, error = graphlora("bench", config_only, "--device", "cpu", *words)
    assert code == 2
    assert message in error


def test_a_directory_without_a_config_is_named(graphlora, tmp_path):
    code, _, error = graphlora("bench", tmp_path, "--device", "cpu")
    assert code == 2
    assert f"no model in {tmp_path}: the folder has no config.json; check the path" in error
    code, _, error = graphlora("bench", tmp_path / "nothere", "--device", "cpu")
    assert code == 2
    assert f"no model at {tmp_path / 'nothere'}; check the path" in error
