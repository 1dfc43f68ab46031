"""`graphlora evaluate`, `generate` and `info` on a trained adapter and on a base model."""

import json
import shutil

import pytest

from graphlora.records import RunRecord


def test_evaluate_measures_adapter_and_base(graphlora, adapter, choices_file, tmp_path):
    code, out, _ = graphlora(
        "evaluate", adapter, "--task", choices_file, "--split", "all", "--with_base",
        "--output", tmp_path / "record.json", "--item_scores", tmp_path / "items.jsonl",
    )  # fmt: skip
    assert code == 0
    record = RunRecord.read(tmp_path / "record.json")
    assert set(record.metrics) == {str(choices_file), f"{choices_file} (base)"}
    assert record.metrics[str(choices_file)]["n"] == 40
    assert record.metrics[str(choices_file)] != record.metrics[f"{choices_file} (base)"]
    assert len((tmp_path / "items.jsonl").read_text().splitlines()) == 40
    assert f"{record.metrics[str(choices_file)]['acc_norm']:.4f}" in out


def test_the_base_alone_scores_as_the_adapter_switched_off(
    graphlora, adapter, tiny_model, choices_file, tmp_path
):
    words = ["--task", choices_file, "--split", "all", "--scoring", "letter", "--output"]
    graphlora("evaluate", tiny_model, *words, tmp_path / "base.json")
    graphlora("evaluate", adapter, *words, tmp_path / "both.json", "--with_base")
    base, both = (RunRecord.read(tmp_path / f"{name}.json").metrics for name in ("base", "both"))
    assert base[str(choices_file)] == both[f"{choices_file} (base)"]


def test_generate_puts_a_prompt_in_the_form_of_training(command, graphlora, adapter):
    words = ["generate", adapter, "--max_new_tokens", 5, "--prompt"]
    done = command(*words, "What color is the coal 3?")
    assert done.returncode == 0, done.stderr
    assert "form of training: 'Question: {prompt}\\nAnswer:'" in done.stderr
    whole = graphlora(*words, "Question: What color is the coal 3?\nAnswer:", "--template", "{prompt}")[1]
    assert done.stdout == whole


def test_generate_answers_a_file_in_order(graphlora, adapter, tmp_path):
    prompts = ["What color is the sky?", "coal", "What color is the grass and the sea and the snow?"]
    (tmp_path / "prompts.jsonl").write_text("".join(json.dumps({"prompt": text}) + "\n" for text in prompts))
    words = ["generate", adapter, "--max_new_tokens", 6, "--template", "Question: {prompt}\\nAnswer:"]
    code, _, _ = graphlora(
        *words,
        "--file",
        tmp_path / "prompts.jsonl",
        "--batch_size",
        2,
        "--output",
        tmp_path / "answers.jsonl",
    )
    assert code == 0
    rows = [json.loads(line) for line in (tmp_path / "answers.jsonl").read_text().splitlines()]
    assert [row["prompt"] for row in rows] == prompts
    for row in rows:
        alone = graphlora(*words, "--prompt", row["prompt"])[1]
        assert alone.strip() == row["answer"]


def test_chat_reads_messages_and_ends(command, tiny_model):
    done = command(
        "generate", tiny_model, "--max_new_tokens", 4, stdin="hello\n/reset\nagain\n/exit\nnever\n"
    )
    assert done.returncode == 0, done.stderr
    assert "Traceback" not in done.stderr


@pytest.mark.parametrize(
    ("words", "line"),
    [
        (["--prompt", "", "--template", "{prompt}"], "the prompt is empty"),
        (["--prompt", "sky " * 40, "--max_new_tokens", 100], "model's window of 128 tokens"),
        (["--prompt", "a", "--device", "warp"], "device 'warp' is not available"),
        (["--prompt", "a", "--dtype", "float8"], "dtype 'float8' is unknown"),
        (["--prompt", "a", "--base_model", "/nowhere/model"], "no model at /nowhere/model"),
        (["--file", "/nowhere.txt"], "cannot read the prompts in /nowhere.txt"),
    ],
)
def test_mistakes_in_use_are_one_line(graphlora, adapter, words, line):
    code, _, error = graphlora("generate", adapter, *words)
    assert code == 2
    assert line in error


def test_another_base_model_is_refused(graphlora, adapter, other_model):
    code, _, error = graphlora("generate", adapter, "--prompt", "a", "--base_model", other_model)
    assert code == 2
    assert "does not fit" in error


def test_a_tampered_adapter_is_refused(graphlora, adapter, tmp_path):
    copy = shutil.copytree(adapter, tmp_path / "copy")
    weights = copy / "adapter_model.safetensors"
    weights.write_bytes(weights.read_bytes()[:-50])
    for words in (["info", copy], ["generate", copy, "--prompt", "a"], ["evaluate", copy, "--task", "quiz"]):
        code, _, error = graphlora(*words)
        assert code == 2
        assert "truncated or damaged" in error


def test_info_tells_what_the_files_hold(graphlora, adapter, tiny_model):
    code, out, _ = graphlora("info", adapter)
    assert code == 0
    for part in (
        "GRAPHLORA adapter",
        str(tiny_model),
        "num_experts 4",
        "model.layers.1.mlp",
        "lambda",
        "4 steps",
    ):
        assert part in out
    facts = json.loads(graphlora("info", adapter, "--json")[1])
    assert len(facts["layers"]) == 2
    for layer in facts["layers"]:
        assert sum(layer["expert_load"]) == pytest.approx(1, abs=1e-4)
        assert 1 <= layer["poisson_rate"] <= 2
        assert sum(map(sum, layer["adjacency"])) == 2


def test_info_says_that_loading_would_refuse_the_options(graphlora, adapter, tmp_path):
    copy = shutil.copytree(adapter, tmp_path / "adapter")
    values = json.loads((copy / "adapter_config.json").read_text())
    (copy / "adapter_config.json").write_text(json.dumps(values | {"top_k": 99}))
    line = "it cannot be loaded: top_k=99 is larger than num_experts=4; choose top_k between 1 and 4."
    assert line in graphlora("info", copy)[1]
    assert json.loads(graphlora("info", copy, "--json")[1])["refused"] == line.partition(": ")[2]
    assert json.loads(graphlora("info", adapter, "--json")[1])["refused"] is None


def test_info_agrees_with_the_loaded_model(graphlora, adapter):
    from graphlora.training.loading import load_for_use

    model, _, _ = load_for_use(str(adapter), None, "float32", "cpu")
    stats = model.base_model.routing_stats()
    facts = json.loads(graphlora("info", adapter, "--json")[1])
    assert [layer["module"] for layer in facts["layers"]] == list(stats)
    for layer, expected in zip(facts["layers"], stats.values(), strict=True):
        assert layer["expert_load"] == pytest.approx(expected["expert_load"], abs=1e-5)
        assert layer["poisson_rate"] == pytest.approx(expected["poisson_rate"], abs=1e-5)
        assert layer["normal_scale"] == pytest.approx(expected["normal_scale"], abs=1e-5)
        assert layer["adjacency"] == expected["adjacency"]


def test_info_needs_neither_torch_nor_the_base_model(adapter, tmp_path):
    import subprocess
    import sys

    code = (
        "import sys; from graphlora.cli.main import main\n"
        f"assert main(['info', {str(adapter)!r}]) == 0; assert 'torch' not in sys.modules"
    )
    subprocess.run([sys.executable, "-c", code], check=True, capture_output=True)


def test_compile_is_ignored_on_a_cpu(graphlora, adapter):
    words = ["generate", adapter, "--prompt", "What color is the sky?", "--template", "{prompt}"]
    words += ["--max_new_tokens", 4, "--device", "cpu"]
    code, out, error = graphlora(*words, "--compile")
    assert code == 0
    assert error == "--compile is for CUDA devices; ignored on cpu"
    assert out == graphlora(*words)[1]
