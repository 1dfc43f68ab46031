"""What a study is: models, tasks, variants and seeds under one policy, read from YAML and checked."""

from __future__ import annotations

import re
from dataclasses import dataclass, field, fields
from pathlib import Path
from typing import Any, Literal, get_args

from graphlora.errors import GraphLoraError
from graphlora.study.yaml_lines import Lines, Place, read_with_lines
from graphlora.training.recipe import Recipe
from graphlora.training.suggestion import suggestion
from graphlora.untrusted import local_path

SHIPPED = Path(__file__).parents[1] / "studies"
BASE = "base"
MATCH = "match_parameters"
NAME = re.compile(r"[A-Za-z0-9][A-Za-z0-9_-]*")
KEYS = {
    "study": "name of the study, and of its folder of records",
    "description": "what it asks, for people",
    "models": "base models: hub ids, directories, or {name: ..., model: ...}",
    "tasks": "tasks or data files, each trained on and tested on by itself, or {name: ..., task: ..., policy: ...}",
    "variants": "methods: name: {method, preset, any adapter or training option, match_parameters}",
    "seeds": "list of seeds; every variant runs with each",
    "policy": "recipe options that hold for all variants",
    "evaluate": "test, or validation to leave the test split alone (tuning)",
    "metric": "acc_norm, acc or loss",
    "test_limit": "rows of each test split, the same ones for all",
    "keep_adapters": "keep each run's adapter beside the records",
    "data_dir": "folder with the tasks' files in the hub's schemas",
}
Metric = Literal["acc_norm", "acc", "loss"]
# What makes runs comparable stays out of the variants' reach.
OF_THE_STUDY = ("model", "task", "output_dir", "seed", "data_dir", "run_name")


@dataclass(frozen=True)
class StudyModel:
    """A base model: the name in the records, and where it is."""

    name: str
    path: str


@dataclass(frozen=True)
class StudyTask:
    """What is trained on: the name in the records, the data, and recipe options of its own for all variants."""

    name: str
    task: str | dict[str, float]
    policy: dict[str, Any]


@dataclass(frozen=True)
class Variant:
    """A method: recipe options on top of the policy's.

    Attributes:
        name: Name in the records.
        options: Recipe options.
        match_parameters: Variant whose number of trained parameters the rank is chosen to give.
    """

    name: str
    options: dict[str, Any]
    match_parameters: str | None = None


@dataclass(frozen=True)
class StudySpec:
    """A study; the attributes are the keys of its YAML file (`KEYS`).

    Attributes:
        all_variants: The variants of the file, also where `variants` are only some of them.
        lines: Where the values stand in the file.
    """

    study: str
    models: tuple[StudyModel, ...]
    tasks: tuple[StudyTask, ...]
    variants: tuple[Variant, ...]
    seeds: tuple[int, ...]
    policy: dict[str, Any]
    evaluate: Literal["test", "validation"] = "test"
    metric: Metric = "acc_norm"
    test_limit: int | None = None
    keep_adapters: bool = False
    data_dir: str | None = None
    description: str = ""
    all_variants: tuple[Variant, ...] = ()
    lines: Lines = field(default_factory=Lines, compare=False, repr=False)


@dataclass(frozen=True)
class Overrides:
    """What the command line changes in a study.

    Attributes:
        models: Base models in place of the study's; `name=path` gives a name.
        tasks: Tasks in place of the study's.
        data_dir: Folder with the tasks' files.
        settings: `key=value` for the policy, or `variant.key=value` for one variant.
        only: Names of the variants to run.
        seeds: Seeds in place of the study's.
    """

    models: tuple[str, ...] = ()
    tasks: tuple[str, ...] = ()
    data_dir: str | None = None
    settings: tuple[str, ...] = ()
    only: tuple[str, ...] = ()
    seeds: tuple[int, ...] = ()


def shipped_studies() -> dict[str, Path]:
    """Studies that come with the package, by name."""
    return {path.stem: path for path in sorted(SHIPPED.glob("*.yaml"))}


def load_spec(study: str, overrides: Overrides | None = None) -> StudySpec:
    """A study from a file or by the name of a shipped one.

    Args:
        study: Path of a YAML file, or a shipped study's name such as `table1`.
        overrides: What the command line changes.

    Raises:
        GraphLoraError: One line that names the file, the line and the remedy.
    """
    from graphlora.study.overriding import override

    path = Path(study).expanduser()
    shipped = shipped_studies()
    if study in shipped and not path.is_file():
        path = shipped[study]
    elif not path.is_file() and path.suffix not in (".yaml", ".yml"):
        raise GraphLoraError(
            f"no study {study!r}{suggestion(study, set(shipped))}; give a YAML file or one of {', '.join(shipped)}"
        )
    values, lines = read_with_lines(path)
    return read_spec(override(values, lines, overrides or Overrides()), lines)


def read_spec(values: dict[str, Any], lines: Lines | None = None, only: tuple[str, ...] = ()) -> StudySpec:
    """A study from plain values.

    Args:
        values: The keys of `KEYS`, and `only`, a list of variant names to keep.
        lines: Where the values stand, for messages.
        only: Variants to keep; all without it.

    Raises:
        GraphLoraError: See `load_spec`.
    """
    lines = lines or Lines()
    values = dict(values)
    names = values.pop("only", only)
    if not isinstance(names, (list, tuple)):
        raise lines.error(("only",), f"only is {names!r}; give a list of variant names")
    only = tuple(map(str, names))
    for key in values:
        if key not in KEYS:
            raise lines.error(
                (key,), f"unknown key {key!r}{suggestion(str(key), set(KEYS))}; see docs/study.md"
            )
    for key in ("study", "models", "tasks", "variants", "seeds"):
        if values.get(key) in (None, [], {}, ""):
            raise lines.error((key,), f"the study has no {key}: {KEYS[key]}")
    variants = _variants(values["variants"], lines)
    return StudySpec(
        study=_name(values["study"], ("study",), lines),
        models=_models(values["models"], lines),
        tasks=_tasks(values["tasks"], lines),
        variants=_kept(variants, only, lines),
        seeds=_seeds(values["seeds"], lines),
        policy=_options(values.get("policy"), ("policy",), lines, "policy"),
        evaluate=_choice(values.get("evaluate", "test"), ("test", "validation"), ("evaluate",), lines),
        metric=_choice(values.get("metric", "acc_norm"), get_args(Metric), ("metric",), lines),
        test_limit=_typed(values.get("test_limit"), int, ("test_limit",), lines),
        keep_adapters=bool(_typed(values.get("keep_adapters", False), bool, ("keep_adapters",), lines)),
        data_dir=_typed(values.get("data_dir"), str, ("data_dir",), lines),
        description=str(values.get("description", "")).strip(),
        all_variants=variants,
        lines=lines,
    )


def data_name(task: str) -> str:
    """Name of a task or a data file in the records: a file's without its folder and endings."""
    return Path(task).name.partition(".")[0]


def _models(values: Any, lines: Lines) -> tuple[StudyModel, ...]:
    found = []
    for position, value in enumerate(_listed(values, ("models",), lines)):
        place = ("models", position)
        entry = {"model": value} if isinstance(value, str) else value
        if (
            not isinstance(entry, dict)
            or not isinstance(entry.get("model"), str)
            or set(entry) > {"model", "name"}
        ):
            raise lines.error(
                place, f"a model is {value!r}; give a hub id, a directory or {{name: ..., model: ...}}"
            )
        path = entry["model"]
        local = local_path(path)
        found.append(StudyModel(str(entry.get("name") or (local.resolve().name if local else path)), path))
    _unique([model.name for model in found], ("models",), lines)
    return tuple(found)


def _tasks(values: Any, lines: Lines) -> tuple[StudyTask, ...]:
    found = []
    for position, value in enumerate(_listed(values, ("tasks",), lines)):
        place = ("tasks", position)
        entry = {"task": value} if isinstance(value, str) else value
        if not isinstance(entry, dict) or not set(entry) <= {"name", "task", "policy"}:
            raise lines.error(
                place, f"a task is {value!r}; give its name, a data file or {{name, task, policy}}"
            )
        task = entry.get("task", entry.get("name"))
        if not isinstance(task, (str, dict)) or not task:
            raise lines.error(place, f"the task {value!r} names no data; give 'task: NAME' or 'task: FILE'")
        if isinstance(task, dict) and "name" not in entry:
            raise lines.error(
                place, "a mixture needs a name of its own: {name: ..., task: {arc_easy: 1, boolq: 1}}"
            )
        if isinstance(task, dict):
            _unique([data_name(str(part)) for part in task], ("tasks", position), lines)
        name = str(entry.get("name") or data_name(str(task)))
        policy = _options(entry.get("policy"), (*place, "policy"), lines, "policy")
        found.append(StudyTask(name, task, policy))
    _unique([task.name for task in found], ("tasks",), lines)
    return tuple(found)


def _variants(values: Any, lines: Lines) -> tuple[Variant, ...]:
    if not isinstance(values, dict):
        raise lines.error(
            ("variants",), "variants is no mapping; write 'NAME: {preset: graphlora}' lines below it"
        )
    found = []
    for name, given in values.items():
        place = ("variants", str(name))
        if str(name) == BASE:
            raise lines.error(place, f"{BASE!r} is the name of the base model's own record; choose another")
        _name(str(name), place, lines)
        given = dict(given) if isinstance(given, dict) else ({} if given is None else given)
        match = given.pop(MATCH, None) if isinstance(given, dict) else None
        options = _options(given, place, lines, "variant")
        if match is not None and (not isinstance(match, str) or match not in values):
            raise lines.error(
                (*place, MATCH), f"no variant {match!r}{suggestion(str(match), set(map(str, values)))}"
            )
        if match is not None and options.get("method") != "lora":
            raise lines.error((*place, MATCH), f"{MATCH} chooses the rank of method lora; add 'method: lora'")
        found.append(Variant(str(name), options, match))
    matched = {variant.name: variant.match_parameters for variant in found if variant.match_parameters}
    for name, match in matched.items():
        if match in matched:
            raise lines.error(
                ("variants", name, MATCH), f"{match!r} is itself matched to another; name that one"
            )
    return tuple(found)


def _options(values: Any, place: Place, lines: Lines, what: Literal["policy", "variant"]) -> dict[str, Any]:
    """Recipe options; other fields of the adapter's config go to `adapter_args`."""
    if values is None:
        return {}
    if not isinstance(values, dict):
        raise lines.error(place, f"{place[-1]} is {values!r}; write 'option: value' lines below it")
    groups = {item.name: item.metadata["group"] for item in fields(Recipe)}
    options, others = {}, {}
    for name, value in values.items():
        here = (*place, str(name))
        if name in OF_THE_STUDY:
            raise lines.error(here, f"{name} is not for a {what}; it follows from the study's own keys")
        if what == "variant" and groups.get(name) in ("data", "evaluation"):
            raise lines.error(here, f"{name} would differ between variants; put it into the policy of all")
        if name in groups:
            options[name] = value
        else:
            _check_adapter_field(str(name), values, here, lines, set(groups))
            others[name] = value
    given = options.get("adapter_args", {})
    if not isinstance(given, dict):
        raise lines.error(
            (*place, "adapter_args"), f"adapter_args is {given!r}; write 'option: value' lines below it"
        )
    if others:
        options["adapter_args"] = {**given, **others}
    return options


def _check_adapter_field(
    name: str, values: dict[str, Any], place: Place, lines: Lines, options: set[str]
) -> None:
    from peft import LoraConfig

    from graphlora.tuner.config import GraphLoraConfig

    kind = LoraConfig if values.get("method") == "lora" else GraphLoraConfig
    known = {item.name for item in fields(kind)}
    if name not in known:
        raise lines.error(place, f"unknown option {name!r}{suggestion(name, options | known)}")


def _kept(variants: tuple[Variant, ...], only: tuple[str, ...], lines: Lines) -> tuple[Variant, ...]:
    names = [variant.name for variant in variants]
    for name in only:
        if name not in names:
            raise lines.error(
                ("variants",),
                f"no variant {name!r}{suggestion(name, set(names))}; the study has {', '.join(names)}",
            )
    return tuple(variant for variant in variants if not only or variant.name in only)


def _seeds(values: Any, lines: Lines) -> tuple[int, ...]:
    seeds = _listed(values, ("seeds",), lines)
    for position, seed in enumerate(seeds):
        if isinstance(seed, bool) or not isinstance(seed, int) or not 0 <= seed < 2**32:
            raise lines.error(("seeds", position), f"the seed {seed!r} is no whole number from 0 to 2^32 - 1")
    _unique([str(seed) for seed in seeds], ("seeds",), lines)
    return tuple(seeds)


def _listed(values: Any, place: Place, lines: Lines) -> list[Any]:
    if not isinstance(values, list) or not values:
        raise lines.error(
            place, f"{place[0]} is {values!r}; give a list with at least one entry, as in [..., ...]"
        )
    return values


def _unique(names: list[str], place: Place, lines: Lines) -> None:
    for position, name in enumerate(names):
        if name in names[:position]:
            raise lines.error((*place, position), f"{place[0]} has {name} twice; keep one")


def _name(value: Any, place: Place, lines: Lines) -> str:
    if not isinstance(value, str) or not NAME.fullmatch(value):
        raise lines.error(place, f"the name {value!r} must be of letters, digits, '_' and '-'")
    return value


def _choice(value: Any, choices: tuple[str, ...], place: Place, lines: Lines) -> Any:
    if value not in choices:
        hint = suggestion(str(value), set(choices))
        raise lines.error(place, f"{place[0]} is {value!r}; choose one of {', '.join(choices)}{hint}")
    return value


def _typed(value: Any, kind: type, place: Place, lines: Lines) -> Any:
    if value is not None and (not isinstance(value, kind) or (kind is int and (value is True or value < 1))):
        raise lines.error(place, f"{place[0]} is {value!r}; {KEYS[str(place[0])]}")
    return value
