"""Inputs for the two YAML files: a study and a recipe."""

from __future__ import annotations

import json
from dataclasses import fields
from functools import cache
from pathlib import Path
from random import Random
from typing import Any

import yaml

from graphlora.study.plan import make_runs
from graphlora.study.spec import KEYS, read_spec
from graphlora.study.yaml_lines import read_with_lines
from graphlora.training.recipe import Recipe, read_yaml
from graphlora.tuner.presets import PRESETS
from reliability.fuzz.mutate import mutate, mutate_bytes, mutate_text
from reliability.fuzz.reader import Input, Reader

FILE = "file.yaml"
_DUMPER: Any = getattr(yaml, "CSafeDumper", yaml.SafeDumper)
RECIPES: tuple[dict[str, Any], ...] = (
    {
        "model": "m",
        "task": "arc_easy",
        "output_dir": "out",
        "r": 8,
        "learning_rate": 1e-4,
        "top_k": 2,
        "bf16": True,
    },
    {
        "model": "m",
        "task": {"arc_easy": 2, "boolq": 1.5},
        "output_dir": "o",
        "eval_steps": 0.2,
        "save_steps": 0.4,
    },
    {
        "model": "m",
        "task": "data.jsonl",
        "output_dir": "o",
        "method": "lora",
        "target_modules": ["q_proj"],
        "seed": 3,
        "training_args": {"adam_epsilon": "1e-6", "use_cpu": True},
        "max_steps": 5,
        "step_mode": "graph",
    },
    {
        "model": "m",
        "task": "quiz",
        "output_dir": "o",
        "edges": [[0, 1]],
        "adapter_args": {"router_bias": True},
        "early_stopping_patience": 2,
        "eval_strategy": "epoch",
        "warmup_ratio": 0.1,
        "layers_to_transform": [0, 1],
    },
)
STUDIES: tuple[dict[str, Any], ...] = (
    {
        "study": "one",
        "models": ["m/a"],
        "tasks": ["arc_easy"],
        "seeds": [0, 1],
        "variants": {
            "ours": {"preset": "graphlora", "num_experts": 4},
            "lora": {"method": "lora", "match_parameters": "ours"},
        },
        "policy": {"learning_rate": 1e-4, "max_steps": 3},
    },
    {
        "study": "two",
        "description": "text",
        "models": [{"name": "n", "model": "m/b"}],
        "metric": "acc",
        "test_limit": 9,
        "tasks": [{"name": "mix", "task": {"arc_easy": 1, "boolq": 2}, "policy": {"max_length": 64}}, "quiz"],
        "variants": {"a": {"router_bias": False, "adapter_args": {"graph_seed": 1}}, "b": None},
        "seeds": [3],
        "evaluate": "validation",
        "keep_adapters": True,
        "data_dir": "data",
    },
)
SCRAPS = (
    "<<: *a",
    "&a ",
    "*a",
    "&a [*a]",
    "!!python/name:os.system",
    "!!int x",
    "!!timestamp x",
    "!!bool maybe",
    "!!set {a}",
    "!!omap [a: 1]",
    "!!binary ####",
    "!!float z",
    "? [a, b]\n: c",
    "- - - -",
    "\t",
    "%YAML 9.9",
    "---\n",
    "...\n",
    "|\n",
    ">2\n",
    "{a: &a [*a, *a]}",
    "2001-99-99",
    "0o99",
    "1:99:99",
    "9" * 5000,
    ".inf",
    "'",
    '"\\ud800"',
    '"\\0"',
    "\x85",
    "{? : }",
    "[,]",
    "a: 1\na: 2",
    "[" * 150,
    "? " * 120,
    "!<tag:yaml.org,2002:str> 1",
    "!local x",
    "@x",
    "`x`",
    "#",
    ": ",
    "=",
    "<<: {a: 1}",
)


@cache
def _recipe_words() -> tuple[Any, ...]:
    choices = (
        "cloze",
        "letter",
        "steps",
        "no",
        "epoch",
        "lora",
        "graphlora",
        "liger",
        "none",
        "compile",
        "drop",
        "prompt",
    )
    return (
        *(item.name for item in fields(Recipe)),
        *choices,
        *PRESETS,
        0.1,
        0.3,
        1,
        2,
        -1,
        None,
        [],
        {},
        "1e-5",
        "5",
    )


@cache
def _study_words() -> tuple[Any, ...]:
    more = (
        "ours",
        "base",
        "match_parameters",
        "name",
        "task",
        "model",
        "policy",
        "only",
        "loss",
        "test",
        "acc_norm",
    )
    return (*KEYS, *more, *_recipe_words(), "router_gate", ["a"], {"name": "x"}, 2**32, {"m": 1})


def recipe_input(rng: Random) -> Input:
    """A recipe, changed."""
    return _yaml_input(rng, RECIPES, _recipe_words())


def study_input(rng: Random) -> Input:
    """A study, changed."""
    return _yaml_input(rng, STUDIES, _study_words())


def _yaml_input(rng: Random, seeds: tuple[dict[str, Any], ...], words: tuple[Any, ...]) -> Input:
    tree = mutate(rng.choice(seeds), rng, words)
    if rng.random() < 0.05:
        _odd_key(tree, rng)
    text = _dumped(tree, rng)
    if rng.random() < 0.15:
        place = rng.choice([i for i, c in enumerate(text) if c in " \n[{,"] or [0]) + 1
        text = f"{text[:place]}{rng.choice(SCRAPS)}{text[place:]}"
    if rng.random() < 0.06:
        text = mutate_text(text, rng)
    content = text.encode("utf-8", "surrogatepass")
    return {FILE: mutate_bytes(content, rng) if rng.random() < 0.05 else content}


def _odd_key(tree: Any, rng: Random) -> None:
    while isinstance(tree, dict) and tree:
        key = rng.choice(list(tree))
        if rng.random() < 0.4 or not isinstance(tree[key], dict):
            tree[rng.choice((1, None, True, 1.5, float("nan"), 10**30))] = tree.pop(key)
            return
        tree = tree[key]


def _dumped(tree: Any, rng: Random) -> str:
    """YAML in blocks, in brackets, or as the JSON that is YAML too."""
    kind = rng.random()
    try:
        if kind < 0.5:
            return json.dumps(tree, ensure_ascii=False)
        return yaml.dump(
            tree, Dumper=_DUMPER, sort_keys=False, allow_unicode=True, default_flow_style=kind > 0.9
        )
    except (yaml.YAMLError, ValueError, TypeError, UnicodeError, RecursionError):
        return "model: " + "1" * 5000


def _validate_recipe(values: dict[str, Any]) -> None:
    Recipe.from_dict(values)


def _validate_study(parsed: Any) -> None:
    values, lines = parsed
    runs = make_runs(read_spec(values, lines))
    assert runs, "an accepted study has no run"


RECIPE = Reader(
    name="recipe_yaml",
    title="recipes (YAML)",
    generate=recipe_input,
    parse=lambda folder: read_yaml(folder / FILE),
    validate=_validate_recipe,
    modules=("training/recipe.py", "typed.py", "untrusted.py"),
    excluded=(
        "Recipe.from_yaml",
        "Recipe.to_yaml",
        "Recipe.changed",
        "Recipe.adapter_options",
        "fits",
        "parse_json",
        "read_json_object",
        "local_path",
        "_is_deep",
        "_parts",
        "_is_unicode",
    ),
)
STUDY = Reader(
    name="study_yaml",
    title="studies (YAML)",
    generate=study_input,
    parse=lambda folder: read_with_lines(Path(folder) / FILE),
    validate=_validate_study,
    modules=("study/spec.py", "study/yaml_lines.py", "study/plan.py"),
    excluded=(
        "load_spec",
        "shipped_studies",
        "missing_data",
        "Lines.given_by",
        "Run.title",
        "Run.parts",
        "Run.recipe",
        "Run.to_dict",
        "_kept",
    ),
)
