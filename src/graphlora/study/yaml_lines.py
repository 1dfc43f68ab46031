"""YAML whose mistakes can be shown by line: values together with the place that each was written at."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import yaml

from graphlora.errors import GraphLoraError
from graphlora.untrusted import read_yaml, yaml_value

Place = tuple[str | int, ...]


class Lines:
    """Where the values of a YAML file stand.

    Attributes:
        path: The file; `None` where the values do not come from one.
    """

    def __init__(self, path: Path | None = None, lines: dict[Place, int] | None = None) -> None:
        self.path = path
        self._lines = lines or {}
        self._given: dict[Place, str] = {}

    def given_by(self, place: Place, option: str) -> None:
        """Note that the command line gave the value of a place."""
        self._given[place] = option

    def at(self, place: Place) -> str:
        """`"file.yaml:12"`: the line of a value, or of the nearest one around it; `"study"` without a file."""
        if place in self._given:
            return self._given[place]
        if self.path is None:
            return "study"
        while place and place not in self._lines:
            place = place[:-1]
        return f"{self.path}:{self._lines[place]}" if place in self._lines else str(self.path)

    def error(self, place: Place, text: str) -> GraphLoraError:
        """The error of one value, with its line."""
        return GraphLoraError(f"{self.at(place)}: {text}")


def read_with_lines(path: Path) -> tuple[dict[str, Any], Lines]:
    """Mapping in a YAML file, and the lines of its values.

    Raises:
        GraphLoraError: The file is missing or broken, not a mapping, or names a key twice.
    """
    node, where = read_yaml(path, "the study")
    lines: dict[Place, int] = {}
    if node is not None:
        _walk(node, (), lines, path)
    values = yaml_value(node, where)
    if not isinstance(values, dict):
        raise GraphLoraError(f"{path} holds no study: expected lines such as 'study: NAME' and 'variants:'")
    return values, Lines(path, lines)


def _walk(node: Any, place: Place, lines: dict[Place, int], path: Path) -> None:
    lines.setdefault(place, node.start_mark.line + 1)
    if isinstance(node, yaml.SequenceNode):
        for position, part in enumerate(node.value):
            _walk(part, (*place, position), lines, path)
    if not isinstance(node, yaml.MappingNode):
        return
    seen: dict[str, int] = {}
    for key, part in node.value:
        line = key.start_mark.line + 1
        if not isinstance(key, yaml.ScalarNode):
            raise GraphLoraError(f"{path}:{line}: a key must be one word or number, not a list or mapping")
        if key.value == "<<":
            continue
        if key.value in seen:
            raise GraphLoraError(
                f"{path}:{line}: {key.value!r} is here a second time (first in line {seen[key.value]}); keep one"
            )
        seen[key.value] = line
        lines[(*place, key.value)] = line
        _walk(part, (*place, key.value), lines, path)
