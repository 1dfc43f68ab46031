"""What an `adapter_config.json` of others may ask for, checked before anything is built from it."""

from __future__ import annotations

import re
import warnings
from collections.abc import Mapping
from functools import cache
from typing import TYPE_CHECKING, Any, Literal, get_origin, get_type_hints

from peft.utils.peft_types import TaskType

from graphlora.errors import GraphLoraError
from graphlora.typed import fits, type_name

if TYPE_CHECKING:
    from graphlora.tuner.config import GraphLoraConfig

# num_experts times r: beyond this the "low-rank" pairs are wider than any layer that exists.
MAX_TOTAL_RANK = 65_536
MAX_ENTRIES, MAX_NAME = 10_000, 1_000
MAX_LAYERS = 10_000
_FFN_PARTS = (
    "gate_proj",
    "up_proj",
    "down_proj",
    "gate_up_proj",
    "hidden_dropout",
    "output_dropout",
    "act_fn",
)
# Python's regular expressions have no time limit. Without a repeated group and with few repeats they stay fast.
_MAX_REPEATS = 6
_REPEATED_GROUP = re.compile(r"\)\s*[*+{]")
_REPEAT = re.compile(r"(?<!\\)[*+{]")
_MODULE = re.compile(r"[A-Za-z_]\w*(\.\w+)*", re.ASCII)
_LIBRARY = re.compile(r"[\w-]+(\.[\w-]+)*")


def check_types(config: GraphLoraConfig) -> None:
    """Raises `GraphLoraError` for a field of a wrong type, or one that is absurdly long."""
    for name, hint in _hints(type(config)).items():
        value = getattr(config, name)
        # Numbers and choices have messages of their own.
        if name in ("peft_type", "task_type") or hint in (int, float) or get_origin(hint) is Literal:
            continue
        if not fits(value, hint):
            raise GraphLoraError(f"{name}={_short(value)} must be of type {type_name(hint)}.")
        _check_length(name, value)
    tasks = tuple(task.value for task in TaskType)
    if config.task_type is not None and config.task_type not in tasks:
        raise GraphLoraError(
            f"task_type={_short(config.task_type)} is unknown; choose one of {', '.join(tasks)}."
        )


def check_names(config: GraphLoraConfig) -> None:
    """Raises `GraphLoraError` for names and expressions that cannot be, or that could take forever to match."""
    for name in ("target_modules", "attention_target_modules", "exclude_modules"):
        if isinstance(value := getattr(config, name), str):
            check_expression(name, value)
    for name in ("num_experts_pattern", "rank_pattern", "alpha_pattern"):
        for key in getattr(config, name):
            check_expression(name, key)
    patterns = config.layers_pattern
    for pattern in (patterns,) if isinstance(patterns, str) else patterns or ():
        check_expression("layers_pattern", pattern)
    _check_modules(config)
    layers = config.layers_to_transform
    for layer in (layers,) if isinstance(layers, int) else layers or ():
        if isinstance(layer, bool) or not 0 <= layer < MAX_LAYERS:
            raise GraphLoraError(
                f"layers_to_transform names {layer!r}; layers are numbered 0 to {MAX_LAYERS - 1}."
            )


def _check_modules(config: GraphLoraConfig) -> None:
    for part, name in (config.ffn_modules or {}).items():
        if part not in _FFN_PARTS:
            raise GraphLoraError(f"ffn_modules names {part!r}; its keys are {', '.join(_FFN_PARTS)}.")
        if not _is_module_name(name):
            raise GraphLoraError(f"ffn_modules: {part}={name!r} is not the name of a module.")
    # PEFT imports the library that is named here.
    for key, name in (config.auto_mapping or {}).items():
        if not isinstance(name, str) or not _LIBRARY.fullmatch(name):
            raise GraphLoraError(f"auto_mapping: {key}={_short(name)} is not the name of a library or class.")


def check_expression(name: str, expression: str) -> None:
    """Raises `GraphLoraError` for a regular expression that is broken or may take forever.

    Args:
        name: the field, for the message.
        expression: the expression.
    """
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            re.compile(expression)
    except (re.error, OverflowError, RecursionError) as error:
        raise GraphLoraError(f"{name}={_short(expression)} is no regular expression: {error}.") from error
    repeats = len(_REPEAT.findall(expression))
    if _REPEATED_GROUP.search(expression) or repeats > _MAX_REPEATS:
        raise GraphLoraError(
            f"{name}={_short(expression)} may take forever to match: use at most {_MAX_REPEATS} repeats and no "
            "repeated group, or give a list of names."
        )


def check_size(config: GraphLoraConfig) -> None:
    """Raises `GraphLoraError` where experts and rank together ask for matrices that no model has room for."""
    counts = [config.num_experts, *(config.num_experts_by_layer or ()), *config.num_experts_pattern.values()]
    ranks = [config.r, *config.rank_pattern.values()]
    if max(counts) * max(ranks) > MAX_TOTAL_RANK:
        raise GraphLoraError(
            f"{max(counts)} experts of rank {max(ranks)} are {max(counts) * max(ranks)} in all; num_experts times r "
            f"may be at most {MAX_TOTAL_RANK}."
        )
    edges = config.edges
    if edges is not None and len(edges) > config.num_experts**2:
        raise GraphLoraError(
            f"edges lists {len(edges)} pairs of {config.num_experts} experts; give each pair once."
        )


@cache
def _hints(kind: type[Any]) -> dict[str, Any]:
    return get_type_hints(kind)


def _check_length(name: str, value: object) -> None:
    if isinstance(value, str):
        if len(value) > MAX_NAME:
            raise GraphLoraError(
                f"{name} is a text of {len(value)} characters; at most {MAX_NAME} are allowed."
            )
        if not value.isprintable():
            raise GraphLoraError(
                f"{name}={_short(value)} holds characters that are not printable; remove them."
            )
        return
    if name != "edges" and isinstance(value, (list, tuple, set, Mapping)):
        if len(value) > MAX_ENTRIES:
            raise GraphLoraError(f"{name} has {len(value)} entries; at most {MAX_ENTRIES} are allowed.")
        parts = [*value, *value.values()] if isinstance(value, Mapping) else value
        for part in parts:
            _check_length(name, part)


def _is_module_name(name: str) -> bool:
    """Whether it is a dotted name without Python's own `__names__`."""
    return _MODULE.fullmatch(name) is not None and "__" not in name


def _short(value: object) -> str:
    text = repr(value)
    return text if len(text) <= 200 else f"{text[:200]}..."
