"""Reading text that others wrote: bounded in size and depth, and every failure is one line that names the place.

JSON and YAML parsers end in many ways where a document is hostile: a recursion error, a number of a million digits, a
few lines of YAML aliases that stand for terabytes. Here all of them end in a `GraphLoraError`. Imports no torch.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import yaml

from graphlora.errors import GraphLoraError

MAX_JSON_BYTES = 16 * 2**20
MAX_YAML_BYTES = 2**20
MAX_DEPTH = 100
MAX_YAML_VALUES = 100_000
# libyaml's loader where PyYAML has it: ten times faster. Its recursion is not bounded, hence `_check_depth`.
_LOADER: Any = getattr(yaml, "CSafeLoader", yaml.SafeLoader)


def read_text(path: Path, what: str, limit: int = MAX_JSON_BYTES) -> str:
    """The text of a file.

    Args:
        path: The file.
        what: What it should be, for messages: `"the recipe"`.
        limit: Most bytes that are read.

    Raises:
        GraphLoraError: It cannot be read, is larger, or is not UTF-8.
    """
    try:
        with path.open("rb") as file:
            content = file.read(limit + 1)
    except (OSError, ValueError) as error:
        reason = getattr(error, "strerror", None) or error
        raise GraphLoraError(f"cannot read {what} {path}: {reason}") from error
    if len(content) > limit:
        raise GraphLoraError(f"{path} is larger than {limit:,} bytes; that is not {what}")
    try:
        return content.decode("utf-8")
    except UnicodeDecodeError as error:
        raise GraphLoraError(f"{path} is broken: not UTF-8 text (byte {error.start})") from error


def parse_json(text: str, where: str) -> Any:
    """The value of a JSON text.

    Raises:
        GraphLoraError: Not JSON, nested more than `MAX_DEPTH` deep, a number of too many digits, or text that cannot
            be written as UTF-8.
    """
    try:
        value = json.loads(text)
    except json.JSONDecodeError as error:
        line = f"line {error.lineno}, " if error.lineno > 1 else ""
        problem = error.msg.removesuffix(" at")
        raise GraphLoraError(f"{where}: broken JSON ({problem} at {line}column {error.colno})") from error
    except RecursionError as error:
        raise _too_deep(where) from error
    except ValueError as error:
        raise GraphLoraError(f"{where}: broken JSON (a number has too many digits)") from error
    if text.count("[") + text.count("{") > MAX_DEPTH and _is_deep(value):
        raise _too_deep(where)
    if "\\ud" in text.lower() and not _is_unicode(value):
        raise GraphLoraError(f"{where}: text with half of a surrogate pair (\\ud800 to \\udfff); repair it")
    return value


def read_json_object(path: Path, what: str, limit: int = MAX_JSON_BYTES) -> dict[str, Any]:
    """The object in a JSON file.

    Args:
        path: The file.
        what: What it should be, for messages: `"an adapter's configuration"`.
        limit: Most bytes that are read.

    Raises:
        GraphLoraError: See `read_text` and `parse_json`; or the file holds no object.
    """
    text = read_text(path, what, limit)
    try:
        value = parse_json(text, f"{path} is broken")
    except GraphLoraError as error:
        raise GraphLoraError(f"{error}; restore it from a copy") from error
    if not isinstance(value, dict):
        raise GraphLoraError(f"{path} holds no JSON object; it is not {what}")
    return value


def compose_yaml(text: str, where: str) -> yaml.Node | None:
    """The nodes of a YAML document, with their lines; None for an empty one.

    Raises:
        GraphLoraError: Not YAML, nested too deep, or aliases that repeat it beyond `MAX_YAML_VALUES` values.
    """
    try:
        _check_depth(text, where)
        node = yaml.compose(text, Loader=_LOADER)
    except yaml.YAMLError as error:
        raise _broken_yaml(error, where) from error
    except ValueError as error:
        raise GraphLoraError(f"{where}: broken YAML: {error}") from error
    if node is not None:
        _measure(node, {}, where)
    return node


def yaml_value(node: yaml.Node | None, where: str) -> Any:
    """The value of composed YAML: plain Python values, never objects of other classes. Changes merge keys in `node`.

    Raises:
        GraphLoraError: A value that its tag does not allow; names the line where it is known.
    """
    if node is None:
        return None
    try:
        return yaml.SafeLoader("").construct_document(node)
    except yaml.YAMLError as error:
        raise _broken_yaml(error, where) from error
    except (ValueError, TypeError, KeyError, AttributeError, OverflowError) as error:
        reason = str(error).splitlines()[0] if str(error) else type(error).__name__
        raise GraphLoraError(f"{where}: broken YAML: a value does not fit its type ({reason})") from error


def read_yaml(path: Path, what: str) -> tuple[yaml.Node | None, str]:
    """The nodes of a YAML file, and the text for messages that names it; see `compose_yaml`."""
    return compose_yaml(read_text(path, what, MAX_YAML_BYTES), str(path)), str(path)


def local_path(name: str) -> Path | None:
    """The path that `name` says, where it can be one and is there; None for everything else."""
    try:
        path = Path(name).expanduser()
        return path if path.exists() else None
    except (OSError, ValueError, RuntimeError):
        return None


def check_model_place(name: str) -> None:
    """Refuses the name of a base model that can only be a path on this disk, where nothing is.

    Raises:
        GraphLoraError: There is no such file or folder.
    """
    if (name.startswith((".", "/", "~")) or name.count("/") > 1) and local_path(name) is None:
        raise GraphLoraError(f"no model at {name}; check the path")


def _check_depth(text: str, where: str) -> None:
    depth = 0
    for event in yaml.parse(text, Loader=_LOADER):
        if isinstance(event, yaml.CollectionStartEvent):
            depth += 1
            if depth > MAX_DEPTH:
                raise _too_deep(f"{where}:{event.start_mark.line + 1}")
        elif isinstance(event, yaml.CollectionEndEvent):
            depth -= 1


def _measure(node: yaml.Node, known: dict[int, tuple[int, int] | None], where: str) -> tuple[int, int]:
    """Number of values and depth of a node with its aliases written out."""
    if id(node) in known:
        found = known[id(node)]
        if found is None:
            raise GraphLoraError(
                f"{_line(node, where)}: an alias stands inside of what it names; write it out"
            )
        return found
    known[id(node)] = None
    parts: list[yaml.Node] = []
    if isinstance(node, yaml.SequenceNode):
        parts = list(node.value)
    elif isinstance(node, yaml.MappingNode):
        parts = [part for pair in node.value for part in pair]
    measured = [_measure(part, known, where) for part in parts]
    size, depth = 1 + sum(size for size, _ in measured), 1 + max((depth for _, depth in measured), default=0)
    if size > MAX_YAML_VALUES:
        raise GraphLoraError(
            f"{_line(node, where)}: more than {MAX_YAML_VALUES:,} values with all aliases written out"
        )
    if depth > MAX_DEPTH:
        raise _too_deep(_line(node, where))
    known[id(node)] = size, depth
    return size, depth


def _line(node: yaml.Node, where: str) -> str:
    return f"{where}:{node.start_mark.line + 1}"


def _broken_yaml(error: yaml.YAMLError, where: str) -> GraphLoraError:
    mark = getattr(error, "problem_mark", None)
    line = f":{mark.line + 1}" if mark else ""
    return GraphLoraError(f"{where}{line}: broken YAML: {getattr(error, 'problem', None) or error}")


def _too_deep(where: str) -> GraphLoraError:
    return GraphLoraError(f"{where}: nested more than {MAX_DEPTH} deep; that is no file of this program")


def _is_deep(value: Any) -> bool:
    level = [value]
    for _ in range(MAX_DEPTH):
        level = [part for parent in level if isinstance(parent, (dict, list)) for part in _parts(parent)]
        if not level:
            return False
    return True


def _parts(parent: dict[str, Any] | list[Any]) -> Any:
    return parent.values() if isinstance(parent, dict) else parent


def _is_unicode(value: Any) -> bool:
    try:
        json.dumps(value, ensure_ascii=False).encode("utf-8")
    except UnicodeEncodeError:
        return False
    return True
