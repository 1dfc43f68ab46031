"""The command line as a user meets it: help, speed, mistakes, exit codes."""

import os
import re
import subprocess
import sys
import time

import pytest

from graphlora.cli.main import COMMANDS, build_parser


def test_help_and_version_import_no_torch():
    code = (
        "import sys\nfrom graphlora.cli.main import main\n"
        "for words in (['--help'], ['train', '--help'], ['--version']):\n"
        "    try: main(words)\n"
        "    except SystemExit as end: assert end.code == 0\n"
        "assert not {'torch', 'transformers', 'peft', 'numpy', 'matplotlib'} & set(sys.modules)"
    )
    started = time.process_time()
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert time.process_time() - started < 1


@pytest.mark.parametrize("name", COMMANDS)
def test_each_command_teaches_with_an_example_that_it_accepts(name):
    parsers = build_parser()[1]
    text = parsers[name].format_help()
    assert "example:" in text
    assert f"graphlora {name} " in text
    own = re.sub(r".*accelerate launch.*", "", text.split("options:")[0])
    options = set(re.findall(r"(--[a-z_]+)", own))
    known = {option for action in parsers[name]._actions for option in action.option_strings}
    assert options <= known
    for action in parsers[name]._actions:
        assert action.help, action.option_strings


@pytest.mark.parametrize(
    ("words", "line"),
    [
        ([], "no command; choose one of train, evaluate"),
        (["trian"], "unknown command 'trian'; choose one of train"),
        (
            ["train", "--learnin_rate", "1"],
            "unknown argument --learnin_rate; did you mean '--learning_rate'?",
        ),
        (
            ["train", "--batch_size", "4"],
            "unknown argument --batch_size; did you mean '--per_device_train_batch_size'?",
        ),
        (["train", "--lr=1e-4"], "unknown argument --lr=1e-4; did you mean '--learning_rate'?"),
        (["train", "--learning_rate", "fast"], "--learning_rate is 'fast'; expected float"),
        (["train", "--scoring", "clozed"], "--scoring is 'clozed'; expected one of cloze, letter"),
        (["train", "--r", "2.5"], "--r is '2.5'; expected int"),
        (
            ["train", "--layers_to_transform", "top"],
            "--layers_to_transform is 'top'; expected list[int] or int",
        ),
        (
            ["train", "--save_steps", "often"],
            "--save_steps is 'often'; expected float",
        ),
        (
            ["train", "--adapter_args", "nope"],
            "--adapter_args is 'nope'; expected dict, as in '{name: value}'",
        ),
        (
            ["bench", "m", "--preset", "best"],
            "--preset is 'best'; expected one of graphlora, paper, released",
        ),
        (["train", "--task", "quiz"], "the recipe has no model, output_dir; give --model"),
        (["train", "--config", "/nowhere.yaml"], "cannot read the recipe /nowhere.yaml"),
        (["generate", "m", "--prompt", "a", "--file", "b"], "--prompt and --file are both given"),
        (["generate", "m", "--prompt", "a", "--template", "x"], "it needs {prompt}"),
        (
            ["generate", "m", "--prompt", "a", "--max_new_tokens", "0"],
            "--max_new_tokens is 0; give at least 1",
        ),
        (["info", "/nowhere"], "no adapter directory at /nowhere"),
        (["evaluate", "/nowhere/model", "--task", "quiz", "--limit", "2"], "no model at /nowhere/model"),
        (["evaluate", "/nowhere/model", "--task", "quizz"], "unknown task 'quizz'"),
        (["evaluate", "/nowhere/model"], "see --help"),
    ],
)
def test_a_mistake_is_one_line_and_exit_code_2(graphlora, words, line):
    code, out, error = graphlora(*words)
    assert code == 2
    assert out == ""
    assert error.startswith("graphlora: error: ")
    assert line in error


def test_a_mistake_in_a_real_process(command):
    done = command("info", "/nowhere")
    assert done.returncode == 2
    assert done.stderr == "graphlora: error: no adapter directory at /nowhere; check the path\n"


def test_debug_shows_where_it_came_from(graphlora, capsys):
    from graphlora.cli.main import main

    assert main(["info", "/nowhere", "--debug"]) == 2
    assert "Traceback" in capsys.readouterr().err


def test_options_may_be_written_with_hyphens(graphlora):
    assert "--max_new_tokens is 0" in graphlora("generate", "m", "--prompt", "a", "--max-new-tokens=0")[2]


@pytest.mark.parametrize(
    ("line", "expected"),
    [
        ("graphlora tr", "train"),
        ("graphlora train --learning", "--learning_rate"),
        ("graphlora train --scoring ", "cloze"),
    ],
)
def test_tab_completion(line, expected):
    pytest.importorskip("argcomplete")
    shell = {"COMP_LINE": line, "COMP_POINT": str(len(line)), "_ARGCOMPLETE_STDOUT_FILENAME": "/dev/stdout"}
    environment = os.environ | {"_ARGCOMPLETE": "1", "_ARGCOMPLETE_IFS": "\n"} | shell
    code = "from graphlora.cli.main import main; main()"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, env=environment)
    assert expected in done.stdout.split(), done.stderr
