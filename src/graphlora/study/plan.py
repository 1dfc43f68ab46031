"""The runs of a study: one per model, task, variant and seed, each with a name that its configuration decides."""

from __future__ import annotations

import copy
import os
from dataclasses import asdict, dataclass, fields
from functools import cache, cached_property
from pathlib import Path
from typing import Any, Literal

from graphlora.errors import GraphLoraError
from graphlora.records import config_hash
from graphlora.study.presets import preset_values
from graphlora.study.spec import BASE, StudyModel, StudySpec, StudyTask, Variant, data_name
from graphlora.tasks import load_examples, load_mixture
from graphlora.training.recipe import Recipe
from graphlora.untrusted import check_model_place, local_path

MAX_RUNS = 20_000
NOWHERE = "(the study's)"
# These say where something is, or how it is computed; they do not change what a run is.
PLACES = ("model", "task", "output_dir", "data_dir", "run_name", "report_to")


@dataclass(frozen=True)
class Run:
    """One run of a study; all values are JSON, so that it can be sent to another process.

    Attributes:
        run_id: Hash of everything that decides the run.
        study: Name of the study.
        model: Name of the base model.
        task: Name of the task.
        variant: Name of the variant; `"base"` for the base model without an adapter.
        seed: Seed; `None` for the base model, which has no randomness.
        options: Recipe options, all but `output_dir`.
        match: Recipe options of the variant whose number of trained parameters the rank is to give.
        policy: Options that hold for all variants on this task.
        evaluate: Split that gives the score.
        metric: Headline metric.
        test_limit: Rows of each test split.
        keep_adapter: Whether the adapter stays on disk.
    """

    run_id: str
    study: str
    model: str
    task: str
    variant: str
    seed: int | None
    options: dict[str, Any]
    match: dict[str, Any] | None
    policy: dict[str, Any]
    evaluate: Literal["test", "validation"]
    metric: str
    test_limit: int | None
    keep_adapter: bool

    @cached_property
    def title(self) -> str:
        """`"table1: graphlora on boolq, seed 3"`."""
        seed = "" if self.seed is None else f", seed {self.seed}"
        return f"{self.model}: {self.variant} on {self.task}{seed}"

    @property
    def parts(self) -> dict[str, str]:
        """Name and data of what is scored: the task, or each part of a mixture."""
        data = self.options["task"]
        return {data_name(part): part for part in data} if isinstance(data, dict) else {self.task: data}

    def recipe(self, output_dir: str | Path = NOWHERE) -> Recipe:
        """Recipe of the run; a rank that is still to be matched is the variant's own.

        Raises:
            GraphLoraError: An option of a wrong type, out of its range, or that does not go with another.
        """
        return Recipe.from_dict({**self.options, "output_dir": str(output_dir)})

    def to_dict(self) -> dict[str, Any]:
        """The run as JSON values; `Run(**values)` reads it back."""
        return asdict(self)


def make_runs(spec: StudySpec) -> list[Run]:
    """All runs, the base model's first, then seed by seed, so that a study stopped early compares all variants.

    Raises:
        GraphLoraError: A variant's options do not make a recipe; names its line.
    """
    cells = [(model, task) for model in spec.models for task in spec.tasks]
    recipes = {
        (model.name, task.name, variant.name): _checked(spec, model, task, variant)
        for model, task in cells
        for variant in spec.all_variants
    }
    policies = {task.name: _policy(spec, model, task) for model, task in cells}
    num_runs = len(cells) * (1 + len(spec.seeds) * len(spec.variants))
    if num_runs > MAX_RUNS:
        raise GraphLoraError(f"the study has {num_runs:,} runs; at most {MAX_RUNS:,} can be planned at once")
    runs = [_base_run(spec, model, task, policies[task.name]) for model, task in cells]
    for seed in spec.seeds:
        for model, task in cells:
            for variant in spec.variants:
                recipe = recipes[model.name, task.name, variant.name]
                target = recipes.get((model.name, task.name, variant.match_parameters or ""))
                runs.append(_run(spec, model, task, variant.name, seed, recipe, target, policies[task.name]))
    return runs


def missing_data(runs: list[Run]) -> None:
    """Look at one row of every split that the runs need, so that a wrong path is told before the first hour.

    Raises:
        GraphLoraError: A model's path with nothing there; data that cannot be loaded, or, for a test split, has no
            choices to score.
    """
    seen = set()
    for run in runs:
        recipe = run.recipe()
        check_model_place(recipe.model)
        key = (str(recipe.task), recipe.data_dir, run.evaluate)
        if key in seen:
            continue
        seen.add(key)
        if isinstance(recipe.task, dict):
            load_mixture(recipe.task, "train", data_dir=recipe.data_dir, limit=1)
        for spec in run.parts.values():
            for split in ("train", "validation", *(("test",) if run.evaluate == "test" else ())):
                found = load_examples(spec, split, data_dir=recipe.data_dir, limit=1)
                if split == run.evaluate and run.metric != "loss" and not hasattr(found[0], "choices"):
                    raise GraphLoraError(
                        f"{spec} has no choices to score; set metric: loss and evaluate: validation in the study"
                    )


def _checked(spec: StudySpec, model: StudyModel, task: StudyTask, variant: Variant) -> Recipe:
    options = _options(spec, model, task) | _merged(spec, task, variant)
    try:
        recipe = Recipe.from_dict({**options, "output_dir": NOWHERE})
        if recipe.method == "graphlora":
            preset_values(recipe.preset)
    except GraphLoraError as error:
        name = str(error).split()[0]
        here = ("variants", variant.name) if name in variant.options else ("policy", name)
        place = (*here, name) if name in variant.options else here
        raise spec.lines.error(place, f"variant {variant.name}: {error}") from error
    if spec.evaluate == "validation" and recipe.eval_strategy == "no":
        raise spec.lines.error(("policy", "eval_strategy"), "evaluate is validation, but eval_strategy is no")
    return recipe


def _options(spec: StudySpec, model: StudyModel, task: StudyTask) -> dict[str, Any]:
    data = task.task if isinstance(task.task, str) else {_place(part): w for part, w in task.task.items()}
    options = {"model": _place(model.path), "task": _place(data) if isinstance(data, str) else data}
    return options | ({"data_dir": _place(spec.data_dir)} if spec.data_dir is not None else {})


def _merged(spec: StudySpec, task: StudyTask, variant: Variant) -> dict[str, Any]:
    """Policy, then the task's own policy, then the variant; nested options are joined."""
    merged: dict[str, Any] = {}
    for options in (spec.policy, task.policy, variant.options):
        for name, value in options.items():
            if isinstance(value, dict) and isinstance(merged.get(name), dict):
                value = {**merged[name], **value}
            merged[name] = value
    return merged


def _place(name: str) -> str:
    """Absolute path where the name is on this disk, so that any working directory finds it."""
    path = local_path(name)
    if path is not None and (path.is_dir() or "/" in name or "." in path.name):
        return str(path.resolve())
    return os.path.abspath(os.path.expanduser(name)) if name.startswith((".", "/", "~")) else name


def _run(
    spec: StudySpec,
    model: StudyModel,
    task: StudyTask,
    variant: str,
    seed: int | None,
    recipe: Recipe,
    target: Recipe | None,
    policy: dict[str, Any],
) -> Run:
    if seed is not None:
        recipe = recipe.changed(seed=seed)
    given, match = _given(recipe), None if target is None else _given(target.changed(seed=0))
    decides = {
        "study": spec.study,
        "model": model.name,
        "task": task.name,
        "variant": variant,
        "options": _resolved(given),
        "match": None if match is None else _resolved(match),
        "evaluate": [spec.evaluate, spec.metric, spec.test_limit],
        "parts": {data_name(part): weight for part, weight in task.task.items()}
        if isinstance(task.task, dict)
        else None,
    }
    return Run(
        run_id=config_hash(decides),
        study=spec.study,
        model=model.name,
        task=task.name,
        variant=variant,
        seed=seed,
        options=given,
        match=match,
        policy=policy,
        evaluate=spec.evaluate,
        metric=spec.metric,
        test_limit=spec.test_limit,
        keep_adapter=spec.keep_adapters and variant != BASE,
    )


def _policy(spec: StudySpec, model: StudyModel, task: StudyTask) -> dict[str, Any]:
    """The policy's options as the recipe takes them: `1e-3` as a number."""
    recipe = _checked(spec, model, task, Variant(BASE, {}))
    return {name: getattr(recipe, name) for name in {**spec.policy, **task.policy}}


def _base_run(spec: StudySpec, model: StudyModel, task: StudyTask, policy: dict[str, Any]) -> Run:
    """The base model's evaluation: of the policy, only what decides scores counts."""
    nothing = Variant(BASE, {})
    recipe = _checked(spec, model, task, nothing)
    kept = (
        "model",
        "task",
        "data_dir",
        "scoring",
        "truncation",
        "dtype",
        "attn_implementation",
        "load_in_4bit",
    )
    kept += ("max_length", "eval_limit", "limit_seed")
    plain = Recipe(**{name: getattr(recipe, name) for name in kept}, output_dir=NOWHERE)
    return _run(spec, model, task, BASE, None, plain, None, policy)


def _given(recipe: Recipe) -> dict[str, Any]:
    """The recipe's options that differ from the defaults, so that new options leave old runs what they are."""
    needed = ("model", "task", "seed")
    default = _defaults()
    return {
        item.name: copy.deepcopy(getattr(recipe, item.name))
        for item in fields(Recipe)
        if item.name != "output_dir"
        and (item.name in needed or getattr(recipe, item.name) != default[item.name])
    }


@cache
def _defaults() -> dict[str, Any]:
    return asdict(Recipe(model="", task="", output_dir=""))


def _resolved(options: dict[str, Any]) -> dict[str, Any]:
    """Options with the preset's own values in place of its name, and without places on this machine."""
    kept = {name: value for name, value in options.items() if name not in PLACES}
    if kept.get("method", "graphlora") == "lora":
        return kept
    return {**preset_values(kept.get("preset")), **kept}
