"""What the command line changes in a study's values."""

from __future__ import annotations

import copy
from typing import Any

import yaml

from graphlora.errors import GraphLoraError
from graphlora.study.spec import Overrides
from graphlora.study.yaml_lines import Lines, Place
from graphlora.training.suggestion import suggestion


def override(values: dict[str, Any], lines: Lines, overrides: Overrides) -> dict[str, Any]:
    """The values of a study's file with those of the command line in their place.

    Args:
        values: Values of the file.
        lines: Learns which values the command line gave.
        overrides: The command line's.

    Raises:
        GraphLoraError: A setting that is not `key=value`, or names a variant that the study does not have.
    """
    values = copy.deepcopy(values)
    if overrides.models:
        values["models"] = [_model(model) for model in overrides.models]
        lines.given_by(("models",), "--model")
    if overrides.tasks:
        values["tasks"] = [_task(values.get("tasks"), name) for name in overrides.tasks]
        lines.given_by(("tasks",), "--task")
    if overrides.seeds:
        values["seeds"] = list(overrides.seeds)
        lines.given_by(("seeds",), "--seeds")
    if overrides.data_dir is not None:
        values["data_dir"] = overrides.data_dir
    for setting in overrides.settings:
        _set(values, lines, setting)
    if overrides.only:
        values["only"] = list(overrides.only)
        lines.given_by(("variants",), "--only")
    return values


def _model(text: str) -> str | dict[str, str]:
    name, equals, path = text.partition("=")
    return {"name": name, "model": path} if equals else text


def _task(known: Any, name: str) -> Any:
    """The study's own entry of that name, with its policy, or the task alone."""
    for entry in known if isinstance(known, list) else []:
        if isinstance(entry, dict) and name in (entry.get("name"), entry.get("task")):
            return entry
    return name


def _set(values: dict[str, Any], lines: Lines, setting: str) -> None:
    key, equals, text = setting.partition("=")
    if not equals or not key:
        raise GraphLoraError(f"--set {setting!r} is not key=value; as in --set max_steps=100")
    try:
        value = yaml.safe_load(text)
    except yaml.YAMLError as error:
        raise GraphLoraError(f"--set {setting}: the value is broken YAML") from error
    variants = values.get("variants") or {}
    part, dot, rest = key.partition(".")
    if dot and part in variants:
        place: Place = ("variants", part, *rest.split("."))
    elif dot and part not in ("training_args", "adapter_args"):
        raise GraphLoraError(
            f"--set {setting}: no variant {part!r}{suggestion(part, set(map(str, variants)))}; "
            "give an option of the policy, or VARIANT.option"
        )
    else:
        place = ("policy", *key.split("."))
        for task in values.get("tasks") or []:
            if isinstance(task, dict):
                (task.get("policy") or {}).pop(key, None)
    _put(values, place, value)
    lines.given_by(place, f"--set {key}")


def _put(values: dict[str, Any], place: Place, value: Any) -> None:
    for part in place[:-1]:
        if not isinstance(values.get(str(part)), dict):
            values[str(part)] = {}
        values = values[str(part)]
    values[str(place[-1])] = value
