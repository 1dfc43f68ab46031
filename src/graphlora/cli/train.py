"""`graphlora train`: fine-tune a model from a recipe."""

from __future__ import annotations

import shlex
import warnings
from dataclasses import MISSING, fields
from typing import Any

from jsonargparse import SUPPRESS, ArgumentParser, Namespace

from graphlora.cli.parsing import make_parser
from graphlora.errors import GraphLoraError, Interrupted
from graphlora.training.interrupts import Interrupts
from graphlora.training.recipe import GROUPS, Recipe, option_types, read_yaml

DESCRIPTION = """\
Fine-tune a model with GraphLoRA (or plain LoRA, to compare). A run is a recipe: options given here, on
top of those in a YAML file with the same names (--config). The output directory gets the adapter, the
recipe in full (config.yaml), the record (record.json) and the checkpoints. Ctrl-C or SIGTERM finishes the step,
saves a checkpoint, says how to go on, and exits with 130 or 143; a second one stops at once.
Several GPUs: `accelerate launch` or `torchrun`, with the configs that `graphlora accelerate` lists."""
EXAMPLE = """
graphlora train --model HuggingFaceTB/SmolLM2-135M-Instruct --task arc_easy --output_dir runs/arc
graphlora train --config runs/arc/config.yaml --learning_rate 1e-4 --output_dir runs/arc-slower
graphlora train --config runs/arc/config.yaml --resume
graphlora train --model MODEL --task my_rows.jsonl --output_dir runs/mine --method lora --r 16
accelerate launch --config_file "$(graphlora accelerate ddp)" -m graphlora train --config RECIPE.yaml
"""


def build_parser() -> ArgumentParser:
    """Parser of the command; options that are left out are absent from its result."""
    parser = make_parser("graphlora train [--config RECIPE.yaml] [options]", DESCRIPTION, EXAMPLE)
    run = parser.add_argument_group("Run")
    run.add_argument("--config", type=str | None, default=None, help="YAML file with recipe options")
    run.add_argument("--resume", action="store_true", help="go on from the newest checkpoint in output_dir")
    run.add_argument("--overwrite", action="store_true", help="replace the run in output_dir")
    types = option_types()
    for group, title in GROUPS.items():
        part = parser.add_argument_group(title)
        for item in fields(Recipe):
            if item.metadata["group"] == group:
                text = f"{item.metadata['help']}{_default_text(item)}"
                part.add_argument(f"--{item.name}", type=types[item.name], default=SUPPRESS, help=text)
    return parser


def run(arguments: Namespace) -> None:
    """Train and say where the result is."""
    recipe = make_recipe(arguments)
    # Loading the libraries takes seconds, in which a signal is to end in a line too.
    with Interrupts() as interrupts:
        try:
            from graphlora.training.measuring import memory_text
            from graphlora.training.processes import is_first
            from graphlora.training.run import train
        except KeyboardInterrupt as error:
            raise Interrupted("stopped before training began", interrupts.number or 2) from error
    if not is_first():
        warnings.simplefilter("ignore")  # the first process gives the same ones
    result = train(recipe, resume=arguments.resume, overwrite=arguments.overwrite)
    if not is_first():
        return
    shown = {key: value for key, value in result.metrics.items() if key.startswith("eval_")}
    values = ", ".join(f"{key.removeprefix('eval_')} {value:.4f}" for key, value in shown.items())
    print(f"trained {result.metrics['steps']} steps; kept step {result.metrics['kept_step']}")
    if values:
        print(f"validation: {values}")
    print(f"peak memory: {memory_text(result.record.peak_memory, result.record.metrics['peak_reserved'])}")
    print(f"adapter: {result.output_dir}")
    print("next: " + "\n      ".join(_next_commands(recipe, str(result.output_dir))))


def make_recipe(arguments: Namespace) -> Recipe:
    """Recipe of the file, if any, with the options of the command line on top."""
    values: dict[str, Any] = read_yaml(arguments.config) if arguments.config is not None else {}
    names = {item.name for item in fields(Recipe)}
    given = {name: value for name, value in arguments.as_dict().items() if name in names}
    for name in ("adapter_args", "training_args"):
        if isinstance(values.get(name), dict) and name in given:
            given[name] = values[name] | given[name]
    return Recipe.from_dict(values | given)


def _default_text(item: Any) -> str:
    if item.default is MISSING and item.default_factory is MISSING:
        return " (needed)"
    return "" if item.default is None or item.default is MISSING else f" (default: {item.default})"


def _next_commands(recipe: Recipe, adapter: str) -> list[str]:
    """What to do with the adapter; the tasks that can be scored, by the split that they are scored on."""
    parts: dict[str, list[str]] = {}
    for task in [recipe.task] if isinstance(recipe.task, str) else recipe.task:
        split = _scored_split(task, recipe)
        if split is not None:
            parts.setdefault(split, []).append(shlex.quote(task))
    place = shlex.quote(adapter)
    data_dir = f" --data_dir {shlex.quote(recipe.data_dir)}" if recipe.data_dir else ""
    return [
        *(
            f"graphlora evaluate {place} --task {' '.join(tasks)}{data_dir}{split}"
            for split, tasks in parts.items()
        ),
        f"graphlora generate {place}",
        f"graphlora info {place}",
    ]


def _scored_split(task: str, recipe: Recipe) -> str | None:
    """Words for the split of a task that `graphlora evaluate` can score; `None` where its rows have no choices."""
    from graphlora.tasks import load_choices
    from graphlora.tasks.catalog import find_task

    if find_task(task) is not None and recipe.data_dir is None:
        return ""
    if recipe.streaming:
        return None
    words = {"test": "", "all": " --split all  # there is no test split: rows of training are among them"}
    for split, text in words.items():
        try:
            load_choices(task, split, data_dir=recipe.data_dir, limit=1)
        except GraphLoraError:
            continue
        return text
    return None
