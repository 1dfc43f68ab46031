"""Whether a plain value (of JSON or YAML) is of an annotated type, with text read as the number that it spells."""

from __future__ import annotations

import re
import types
from typing import Any, Literal, Union, get_args, get_origin

from graphlora.errors import GraphLoraError
from graphlora.untrusted import compose_yaml, yaml_value

_NUMBER = re.compile(r"\s*[-+]?\d[\d_]*(\.\d*)?([eE][-+]?\d+)?\s*")
_UNIONS = (Union, types.UnionType)


class Mismatch(Exception):
    """The value is not of the type."""


def fits(value: Any, hint: Any) -> bool:
    """Whether the value is of the type; an int counts as a float, a set or tuple of the right parts as a list."""
    try:
        _convert(value, hint, reads_text=False)
    except Mismatch:
        return False
    return True


def fitted(value: Any, hint: Any) -> Any:
    """The value as the type has it: an int for a float becomes one, and so does the text `1e-4`.

    Text is read as YAML first, and stays text where that gives nothing of the type.

    Raises:
        Mismatch: It cannot be.
    """
    return _convert(value, hint, reads_text=True)


def type_name(hint: Any) -> str:
    """The type as a user writes it: `int | None`."""
    name = hint.__name__ if isinstance(hint, type) and get_origin(hint) is None else str(hint)
    return name.replace("typing.", "").replace("NoneType", "None")


def _convert(value: Any, hint: Any, reads_text: bool) -> Any:
    if reads_text and isinstance(value, str) and hint is not str:
        try:
            return _of_type(_read(value), hint, False)
        except Mismatch:
            pass
    return _of_type(value, hint, reads_text)


def _of_type(value: Any, hint: Any, reads_text: bool) -> Any:
    origin, arguments = get_origin(hint), get_args(hint)
    if hint is Any:
        return value
    if origin in _UNIONS:
        return _first(value, arguments, reads_text)
    if origin is Literal:
        if isinstance(value, str) and value in arguments:
            return value
    elif origin in (list, set):
        if isinstance(value, (list, tuple, set)):
            return [_convert(part, arguments[0], reads_text) for part in value]
    elif origin is dict:
        if isinstance(value, dict):
            of_key, of_value = arguments
            return {
                _of_type(key, of_key, False): _convert(part, of_value, reads_text)
                for key, part in value.items()
            }
    elif _is_plain(value, hint):
        return _as_float(value) if hint is float else value
    raise Mismatch


def _first(value: Any, hints: tuple[Any, ...], reads_text: bool) -> Any:
    for hint in hints:
        try:
            return _of_type(value, hint, reads_text)
        except Mismatch:
            continue
    raise Mismatch


def _is_plain(value: Any, hint: Any) -> bool:
    if hint in (int, float):
        kinds = (int,) if hint is int else (int, float)
        return isinstance(value, kinds) and not isinstance(value, bool)
    return isinstance(value, hint)


def _as_float(value: float) -> float:
    try:
        return float(value)
    except OverflowError as error:
        raise Mismatch from error


def _read(text: str) -> Any:
    if not text.strip():
        return text
    if _NUMBER.fullmatch(text) and "e" in text.lower():
        return float(text)
    try:
        value = yaml_value(compose_yaml(text, "text"), "text")
    except GraphLoraError:
        return text
    return text if isinstance(value, str) else value
