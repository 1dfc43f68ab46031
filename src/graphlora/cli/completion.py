"""Tab completion through argcomplete.

argcomplete looks into plain argparse parsers; those of jsonargparse fail under it once there are subcommands
(jsonargparse 4.53, argcomplete 3.7), so it is shown a plain copy with the same commands, options and choices.
"""

from __future__ import annotations

import argparse
import os
from typing import Any, Literal, get_args, get_origin

from jsonargparse import ArgumentParser

FLAG = 0


def complete(parsers: dict[str, ArgumentParser]) -> None:
    """Answer the shell and end the process where it asks for completions; otherwise do nothing."""
    if "_ARGCOMPLETE" not in os.environ:
        return
    import argcomplete

    argcomplete.autocomplete(plain_copy(parsers))


def plain_copy(parsers: dict[str, ArgumentParser]) -> argparse.ArgumentParser:
    """Plain parser with the commands and their options."""
    plain = argparse.ArgumentParser(prog="graphlora")
    plain.add_argument("--version", action="store_true")
    commands = plain.add_subparsers()
    for name, parser in parsers.items():
        command = commands.add_parser(name)
        for action in parser._actions:
            if action.dest == "help":
                continue
            if action.nargs == FLAG:
                command.add_argument(*action.option_strings, action="store_true", help=action.help)
            else:
                names = action.option_strings or [action.dest]
                command.add_argument(*names, choices=_choices(action), help=action.help)
    return plain


def _choices(action: Any) -> tuple[str, ...] | None:
    kind = getattr(action, "_typehint", action.type)
    if get_origin(kind) is Literal:
        return tuple(map(str, get_args(kind)))
    return ("true", "false") if kind is bool else None
