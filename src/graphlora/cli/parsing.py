"""Parsers that teach in their `--help` and turn mistakes into one line."""

from __future__ import annotations

import re
from argparse import RawDescriptionHelpFormatter
from collections.abc import Iterable
from typing import Any

from jsonargparse import ArgumentError, ArgumentParser, DefaultHelpFormatter

from graphlora.errors import GraphLoraError
from graphlora.training.suggestion import suggestion

_REFUSED = re.compile(r'Parser key "([^"]+)": Expected an? (.*)\. Got value: (.*)$')
_REFUSED_BY_ALL = re.compile(
    r'Parser key "([^"]+)": Does not validate against any of the Union subtypes '
    r"Subtypes: \[(.*?)\] Errors: .*? Given value: (.*)$"
)


class HelpFormatter(RawDescriptionHelpFormatter, DefaultHelpFormatter):
    """Help that keeps the line breaks of descriptions and examples."""

    def __init__(self, prog: str, **kwargs: Any) -> None:
        """Leave room for the long option names."""
        super().__init__(prog, max_help_position=36, width=110, **kwargs)


def make_parser(usage: str, description: str, example: str) -> ArgumentParser:
    """Parser of one command.

    Args:
        usage: The command with its main arguments.
        description: What it does, in a paragraph.
        example: Commands to copy.
    """
    parser = ArgumentParser(
        usage=usage,
        description=f"{description}\n\nexample:\n{_indented(example)}",
        formatter_class=HelpFormatter,
        exit_on_error=False,
        allow_abbrev=False,
    )
    parser.add_argument("--debug", action="store_true", help="show the traceback of an error")
    return parser


def add_model_options(group: Any) -> None:
    """Options of the commands that load a model to use it."""
    group.add_argument(
        "--base_model",
        type=str | None,
        default=None,
        help="base model, if not the one that the adapter names",
    )
    group.add_argument("--dtype", type=str, default="auto", help="auto, float32, bfloat16 or float16")
    group.add_argument("--device", type=str, default="auto", help="auto, cpu, cuda, cuda:1, ...")


def underscored(arguments: Iterable[str]) -> list[str]:
    """Arguments with `--data-dir` written as `--data_dir`: both spellings work."""
    return [_underscored(argument) for argument in arguments]


def explained(error: ArgumentError, options: set[str]) -> GraphLoraError:
    """One line for what the parser refused, with the option that was probably meant."""
    text = " ".join(str(error).split())
    if text.lower().startswith("unrecognized arguments:"):
        name = text.split(":", 1)[1].split()[0]
        return GraphLoraError(f"unknown argument {name}{suggestion(name.split('=')[0], options)}")
    if found := _REFUSED.match(text) or _REFUSED_BY_ALL.match(text):
        name, expected, value = found.groups()
        return GraphLoraError(f"--{name.split('.')[-1]} is {value!r}; expected {_readable(expected)}")
    return GraphLoraError(f"{text}; see --help")


def option_names(parser: ArgumentParser) -> set[str]:
    """Every option of a parser, as it is typed."""
    return {name for action in parser._actions for name in action.option_strings if name.startswith("--")}


def _readable(types: str) -> str:
    """The parser's words for types as a user would say them; `null`, which nearly every option may be, goes unsaid."""
    words = re.sub(r"<class '(\w+)'>", r"\1", types).replace("typing.", "")
    words = re.sub(r"Literal\[(.*?)\]", lambda found: "one of " + found[1].replace("'", ""), words)
    if words.startswith("one of"):
        return words
    kinds = [kind for kind in re.split(r", (?![^\[]*\])", words) if kind != "NoneType"]
    example = ", as in '{name: value}'" if kinds[-1].startswith("dict") else ""
    return " or ".join(kinds) + example


def _underscored(argument: str) -> str:
    name, equals, value = argument.partition("=")
    return name.replace("-", "_").replace("__", "--", 1) + equals + value if _is_option(name) else argument


def _is_option(name: str) -> bool:
    return re.fullmatch(r"--[a-z][a-z0-9_-]*", name) is not None


def _indented(text: str) -> str:
    return "\n".join(f"  {line}" for line in text.strip().splitlines())
