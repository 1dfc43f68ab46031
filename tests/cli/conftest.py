"""The tiny model and data of the training tests, a trained adapter, and a way to run the command line."""

import subprocess
import sys

import pytest

COMMAND = [sys.executable, "-W", "ignore", "-m", "graphlora.cli"]


@pytest.fixture(scope="session")
def command():
    """Run the command line in a process of its own."""

    def run(*words: object, stdin: str | None = None) -> subprocess.CompletedProcess[str]:
        return subprocess.run([*COMMAND, *map(str, words)], capture_output=True, text=True, input=stdin)

    return run


@pytest.fixture
def graphlora(capsys):
    """Run the command line in this process: exit code, standard output, last line of standard error."""
    from graphlora.cli.main import main

    def run(*words: object) -> tuple[int, str, str]:
        code = main([str(word) for word in words])
        captured = capsys.readouterr()
        return code, captured.out, (captured.err.strip().splitlines() or [""])[-1]

    return run


@pytest.fixture(scope="session")
def train_words(tiny_model, choices_file):
    """Words of a training run of seconds, but for its output directory."""
    options = {
        "model": tiny_model,
        "task": choices_file,
        "num_experts": 4,
        "r": 2,
        "learning_rate": "1e-2",
        "per_device_train_batch_size": 4,
        "max_steps": 4,
        "eval_steps": 2,
        "dtype": "float32",
    }
    return ["train", *(word for name, value in options.items() for word in (f"--{name}", value))]


@pytest.fixture(scope="session")
def adapter(train_words, tmp_path_factory):
    """A trained GraphLoRA adapter."""
    from graphlora.cli.main import main

    folder = tmp_path_factory.mktemp("trained") / "adapter"
    assert main([*map(str, train_words), "--output_dir", str(folder)]) == 0
    return folder
