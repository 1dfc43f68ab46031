"""Entry point: finds the command, runs it, and turns a user's mistake into one line and exit code 2."""

# PYTHON_ARGCOMPLETE_OK

from __future__ import annotations

import importlib
import os
import sys
import traceback
import warnings
from collections.abc import Sequence
from importlib import metadata
from types import ModuleType

from jsonargparse import ArgumentError, ArgumentParser

from graphlora.cli.completion import complete
from graphlora.cli.parsing import HelpFormatter, explained, option_names, underscored
from graphlora.errors import GraphLoraError

COMMANDS = {
    "train": ("train", "fine-tune a model from a recipe"),
    "evaluate": ("evaluate", "accuracy of an adapter or a base model on tasks"),
    "generate": ("generate", "answer one prompt, a file of prompts, or chat"),
    "study": ("study", "compare methods over tasks and seeds; stop and go on at any time"),
    "report": ("report", "tables and figures from the records of a study"),
    "bench": ("bench", "how fast and how big a model will be with an adapter, on this machine"),
    "info": ("info", "what an adapter is: sizes, graph, expert loads, record"),
    "verify": ("verify", "whether an adapter is what it was when it was made, and says what it said"),
    "accelerate": ("accelerate", "configs to train on several GPUs with accelerate launch"),
    "import": ("import_adapter", "turn a checkpoint of the paper's authors into an adapter"),
}
DESCRIPTION = """Fine-tune language models with LoRA experts that collaborate over a graph (GraphLoRA).

Every command explains itself: graphlora train --help. A mistake is one line and exit code 2; --debug shows
where it came from. Options may be written with - or _.

tab completion (with `pip install argcomplete`):
  eval "$(register-python-argcomplete graphlora)"      put this line in ~/.bashrc or ~/.zshrc

example:
  graphlora train --model HuggingFaceTB/SmolLM2-135M-Instruct --task quiz --output_dir runs/quiz
  graphlora evaluate runs/quiz --task quiz
  graphlora generate runs/quiz
  graphlora info runs/quiz"""


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the command line.

    Args:
        arguments: Words after the program's name; those of this process when left out.

    Returns:
        Exit code: 0, 1 where `verify` finds a difference, 2 for a user's mistake, 130 after Ctrl-C, 143 after SIGTERM.
    """
    words = underscored(sys.argv[1:] if arguments is None else arguments)
    debug = "--debug" in words
    try:
        return _run(words)
    except GraphLoraError as error:
        if debug:
            traceback.print_exc()
        return _complain(str(error))
    except KeyboardInterrupt as error:
        sys.stderr.write(f"\ngraphlora: {error or 'interrupted'}\n")
        return getattr(error, "exit_code", 130)
    except BrokenPipeError:
        sys.stderr.close()
        return 0


def build_parser() -> tuple[ArgumentParser, dict[str, ArgumentParser]]:
    """The whole parser and the one of each command."""
    parser = ArgumentParser(
        prog="graphlora",
        usage="graphlora COMMAND [options]",
        description=DESCRIPTION,
        formatter_class=HelpFormatter,
        exit_on_error=False,
        allow_abbrev=False,
    )
    parser.add_argument("--version", action="version", version=f"graphlora {_version()}")
    subcommands = parser.add_subcommands(dest="command")
    parsers = {name: _command(name).build_parser() for name in COMMANDS}
    for name, command in parsers.items():
        subcommands.add_subcommand(name, command, help=COMMANDS[name][1])
    return parser, parsers


def _run(words: list[str]) -> int:
    parser, parsers = build_parser()
    complete(parsers)
    known = words[0] if words and words[0] in COMMANDS else None
    try:
        parsed = parser.parse_args(words)
    except ArgumentError as error:
        if words and not words[0].startswith("-") and known is None:
            raise GraphLoraError(
                f"unknown command {words[0]!r}; choose one of {', '.join(COMMANDS)}"
            ) from error
        if not words:
            raise GraphLoraError(f"no command; choose one of {', '.join(COMMANDS)}, or see --help") from error
        raise explained(error, option_names(parsers[known]) if known else set()) from error
    # Libraries warn about each other's deprecations, which a user of the command line cannot mend.
    warnings.filterwarnings("ignore", category=FutureWarning)
    return _command(parsed.command).run(parsed[parsed.command]) or 0


def _command(name: str) -> ModuleType:
    return importlib.import_module(f"graphlora.cli.{COMMANDS[name][0]}")


def _complain(message: str) -> int:
    rank = os.environ.get("RANK", "0")
    who = "graphlora" if rank == "0" else f"graphlora (process {rank})"
    sys.stderr.write(f"{who}: error: {' '.join(message.split())}\n")
    return 2


def _version() -> str:
    try:
        return metadata.version("graphlora")
    except metadata.PackageNotFoundError:
        return "(not installed)"


if __name__ == "__main__":
    sys.exit(main())
