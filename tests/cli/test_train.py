"""`graphlora train`: what it leaves and says, and in real processes Ctrl-C and going on."""

import json
import re
import shlex
import signal
import subprocess
import sys
import time

import pytest

from graphlora.cli.main import main

COMMAND = [sys.executable, "-u", "-W", "ignore", "-m", "graphlora.cli"]


def test_training_says_what_comes_next(adapter):
    assert (adapter / "adapter_model.safetensors").is_file()
    assert "learning_rate: 0.01" in (adapter / "config.yaml").read_text()


def test_a_recipe_file_with_overrides(graphlora, adapter, tmp_path):
    words = ["train", "--config", adapter / "config.yaml", "--output_dir", tmp_path / "b", "--max_steps", 2]
    code, out, _ = graphlora(*words, "--training_args.adam_beta2", "0.9")
    assert code == 0
    assert "trained 2 steps" in out
    assert "GiB (the whole process)" in out
    assert f"graphlora evaluate {tmp_path / 'b'} --task" in out
    written = (tmp_path / "b" / "config.yaml").read_text()
    assert "max_steps: 2" in written
    assert "adam_beta2: 0.9" in written


@pytest.mark.parametrize("method", ["graphlora", "lora"])
def test_the_loss_of_steps_is_told_from_that_of_validations(train_words, tmp_path, capsys, method):
    words = [str(word) for word in train_words]
    if method == "lora":
        position = words.index("--num_experts")
        words[position : position + 2] = ["--method", "lora"]
    assert main([*words, "--output_dir", str(tmp_path / "out"), "--max_steps", "1"]) == 0
    note = "loss: of steps with the routers' losses, of validations without them"
    assert (note in capsys.readouterr().err.splitlines()) == (method == "graphlora")


CHOICES = [
    {"question": f"{n}?", "choices": ["b", "c"], "answer": "b", "split": "test" if n == 9 else "train"}
    for n in range(10)
]
TEXTS = [{"prompt": f"{n}?", "completion": "b"} for n in range(10)]


@pytest.mark.parametrize("kind", ["with a test split", "choices", "texts"])
def test_the_next_commands_work(graphlora, train_words, tmp_path, kind):
    rows = TEXTS if kind == "texts" else CHOICES
    left_out = {"split"} if kind == "choices" else set()
    path, out = tmp_path / "my rows.jsonl", tmp_path / "out"
    lines = [json.dumps({key: row[key] for key in row if key not in left_out}) for row in rows]
    path.write_text("\n".join(lines))
    code, told, _ = graphlora(*train_words, "--task", path, "--max_steps", 1, "--output_dir", out)
    assert code == 0
    commands = [line.strip() for line in told.partition("next: ")[2].splitlines()]
    evaluated = [line for line in commands if line.startswith("graphlora evaluate")]
    assert commands[len(evaluated) :] == [f"graphlora generate {out}", f"graphlora info {out}"]
    if kind == "texts":
        assert evaluated == []
        code, _, error = graphlora("evaluate", out, "--task", path, "--split", "all")
        assert code == 2
        assert (
            f"{path} has no choices; only multiple-choice data can be scored: give rows with question,"
            in error
        )
        return
    code, told, error = graphlora(*shlex.split(evaluated[0], comments=True)[1:])
    assert code == 0, error
    count = 1 if kind == "with a test split" else 10
    assert re.search(rf"my rows.jsonl +{count} ", told)


@pytest.mark.parametrize(
    ("extra", "line"),
    [
        (["--model", "/nowhere/model"], "no model at /nowhere/model"),
        (["--top_k", 9], "top_k=9 is larger than num_experts=4"),
        (["--edge_density", 1.5], "edge_density"),
        (["--edges", "[[0, 7]]"], "edges"),
        (["--method", "lora"], "num_experts has no meaning for method lora"),
        (["--adapter_args", "{rr: 2}"], "rr has no meaning for method graphlora"),
        (["--target_modules", "nothing_here"], "nothing_here"),
        (["--max_length", 5], "more than max_length 5"),
        (["--max_length", 4096], "the model's window is 128 tokens"),
        (["--report_to", "nonsense"], "nonsense"),
        (["--step_mode", "graph"], "step_mode is graph, but CUDA graphs need an NVIDIA GPU, not cpu; set"),
        (["--step_mode", "fast"], "--step_mode is 'fast'; expected"),
        (["--loss_kernel", "liger"], "loss_kernel is liger, but"),
        (["--step_mode", "graph", "--loss_kernel", "liger"], "choose one"),
        (["--training_args.torch_compile", "true"], "use --step_mode compile"),
        (
            ["--metric_for_best_model", "f1"],
            "scoring does not measure; use one of acc_norm, acc, loss, or leave",
        ),
        (["--scoring", "letter", "--metric_for_best_model", "acc_norm"], "use one of acc, loss, or leave"),
        (["--layers_to_transform", "[0, 2]"], "names layer 2; the model's layers are numbered 0 to 1"),
        (["--layers_to_transform", -1], "names layer -1; the model's layers are numbered 0 to 1"),
        (["--loraplus_lr_ratio", 0], "loraplus_lr_ratio is 0.0; give a number above 0"),
    ],
)
def test_mistakes_come_before_training_and_leave_nothing(graphlora, train_words, tmp_path, extra, line):
    code, _, error = graphlora(*train_words, "--output_dir", tmp_path / "out", *extra)
    assert code == 2
    assert error.startswith("graphlora: error: ")
    assert line in error
    assert list((tmp_path / "out").glob("*")) == []


def test_a_tracker_that_is_missing_is_to_be_installed(graphlora, train_words, tmp_path, monkeypatch):
    monkeypatch.setattr("graphlora.training.trainer_setup.is_tensorboard_available", lambda: False)
    code, _, error = graphlora(*train_words, "--output_dir", tmp_path / "out", "--report_to", "tensorboard")
    assert code == 2
    assert "report_to is tensorboard, which is not installed; pip install tensorboard, or" in error


def test_a_backend_that_cannot_run_is_named_before_anything_is_written(
    graphlora, train_words, tmp_path, monkeypatch
):
    words = [*train_words, "--output_dir", tmp_path / "out", "--max_steps", 1, "--backend"]
    with monkeypatch.context() as patch:
        patch.setattr("graphlora.ops.backend.has_triton", lambda: False)
        patch.setattr("graphlora.training.run.make_trainer", None)
        code, _, error = graphlora(*words, "triton")
    assert code == 2
    assert "backend='triton': its kernels run on CUDA devices, not on 'cpu'; use backend='auto'" in error
    assert list((tmp_path / "out").iterdir()) == []
    code, _, error = graphlora(*words, "torch")
    assert code == 0, error


GOOD = '{"question": "%d?", "choices": ["b", "c"], "answer": "b"}'


@pytest.mark.parametrize(
    ("row", "line"),
    [
        (
            '{"question": "a?", "choices": ["b", "c"], "answer": "d"}',
            "rows.jsonl:21: answer 'd' is not among",
        ),
        ('{"question"', "rows.jsonl:21: broken JSON"),
        ('{"text": "a"}', "rows.jsonl:21: no column 'question'; found text"),
    ],
)
def test_broken_rows_are_named_by_file_and_line(graphlora, train_words, tmp_path, row, line):
    rows = [GOOD % number for number in range(20)] + [row]
    (tmp_path / "rows.jsonl").write_text("\n".join(rows))
    words = [*train_words, "--task", tmp_path / "rows.jsonl", "--output_dir", tmp_path / "out"]
    code, _, error = graphlora(*words)
    assert code == 2
    assert line in error


def test_an_output_directory_that_cannot_be_written(graphlora, train_words, tmp_path):
    (tmp_path / "file").write_text("")
    code, _, error = graphlora(*train_words, "--output_dir", tmp_path / "file" / "out")
    assert code == 2
    assert "cannot write to output_dir" in error


def start_and_signal(words, number) -> tuple[int, str]:
    """Start training, send a signal after step 5; exit code and standard error."""
    process = subprocess.Popen([*COMMAND, *map(str, words)], stderr=subprocess.PIPE, text=True)
    assert process.stderr is not None
    told = ""
    while "step 5:" not in told:
        part = process.stderr.read(1)
        assert part, told
        told += part
    process.send_signal(number)
    error = process.communicate(timeout=120)[1]
    return process.returncode, error


@pytest.mark.parametrize(("number", "exit_code"), [(signal.SIGINT, 130), (signal.SIGTERM, 143)])
def test_a_signal_leaves_a_checkpoint_and_the_command_to_go_on(
    graphlora, train_words, tmp_path, number, exit_code
):
    words = [*train_words, "--output_dir", tmp_path / "out", "--max_steps", 4000, "--eval_steps", 2000]
    code, error = start_and_signal([*words, "--logging_steps", 5], number)
    assert code == exit_code, error
    assert "Traceback" not in error
    line = error.strip().splitlines()[-1]
    found = re.search(r"saved (\S+checkpoint-(\d+))\. Go on with: graphlora (.*)$", line)
    assert found, line
    more = int(found.group(2)) + 5
    code, out, _ = graphlora(*shlex.split(found.group(3)), "--max_steps", more, "--eval_steps", more)
    assert code == 0
    assert f"trained {more} steps" in out


def test_ctrl_c_before_training_is_quiet(train_words, tmp_path):
    """While the model loads. On a busy machine Python itself may not have started yet, so wait longer then."""
    for wait in (0.8, 1.5, 3, 5):
        process = subprocess.Popen(
            [*COMMAND, *map(str, train_words), "--output_dir", str(tmp_path / f"out{wait}")],
            stderr=subprocess.PIPE,
            text=True,
            # A shell's background jobs, and what they start, ignore Ctrl-C otherwise.
            preexec_fn=lambda: signal.signal(signal.SIGINT, signal.SIG_DFL),
        )
        time.sleep(wait)
        process.send_signal(signal.SIGINT)
        _, error = process.communicate(timeout=60)
        if process.returncode == 130:
            break
    assert process.returncode == 130
    assert "Traceback" not in error
