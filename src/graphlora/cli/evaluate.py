"""`graphlora evaluate`: accuracy of an adapter or a base model."""

from __future__ import annotations

import time
from collections.abc import Callable
from pathlib import Path
from typing import Any, Literal

from jsonargparse import ArgumentParser, Namespace

from graphlora.cli.parsing import add_model_options, make_parser
from graphlora.errors import GraphLoraError

DESCRIPTION = """\
Accuracy on multiple-choice tasks, by the likelihood of the answers' texts (cloze: acc, and acc_norm per
character, as lm-evaluation-harness defines them) or of their letters (letter). Takes an adapter's directory
or a base model; --with_base measures both, so that the gain is seen at once. --harness lm-eval lets
EleutherAI's lm-evaluation-harness do the scoring, on the same rows; tasks that graphlora does not know are
then the harness's own. --compare shows graphlora's scoring beside it."""
EXAMPLE = """
graphlora evaluate runs/arc --task arc_easy --with_base
graphlora evaluate HuggingFaceTB/SmolLM2-135M-Instruct --task arc_easy boolq --limit 500
graphlora evaluate runs/mine --task my_rows.jsonl --split all --output scores.json
graphlora evaluate runs/arc --task arc_easy social_iqa --harness lm-eval --compare
"""
SHOWN_ITEMS = 20
Score = Callable[[Any, Any, str, str, str | None], dict[str, Any]]


def build_parser() -> ArgumentParser:
    """Parser of the command."""
    parser = make_parser("graphlora evaluate MODEL --task TASK [TASK ...] [options]", DESCRIPTION, EXAMPLE)
    parser.add_argument("model", type=str, help="an adapter's directory, or a base model")
    data = parser.add_argument_group("Data")
    data.add_argument(
        "--task", type=str, nargs="+", required=True, help="task names, data files or hub:owner/name"
    )
    data.add_argument(
        "--split", type=str, default="test", help="train, validation, test, or all for own data"
    )
    data.add_argument("--data_dir", type=str | None, default=None, help="folder with the tasks' files")
    data.add_argument("--limit", type=int | None, default=None, help="rows per task, chosen by the seed")
    data.add_argument("--seed", type=int, default=0, help="seed of that choice")
    scoring = parser.add_argument_group("Scoring")
    scoring.add_argument("--scoring", type=Literal["cloze", "letter"], default="cloze", help="how to answer")
    scoring.add_argument("--with_base", action="store_true", help="measure the base model too")
    scoring.add_argument("--truncate", action="store_true", help="cut prompts longer than the model's window")
    scoring.add_argument("--tokens_per_batch", type=int | None, default=None, help="batch size in tokens")
    harness = parser.add_argument_group("Harness")
    harness.add_argument("--harness", type=Literal["none", "lm-eval"], default="none", help="who scores")
    harness.add_argument(
        "--batch_size", type=int | None, default=None, help="its batch size in texts, 8 if unset"
    )
    harness.add_argument(
        "--compare", action="store_true", help="score with graphlora too, and list differences"
    )
    add_model_options(parser.add_argument_group("Model"))
    output = parser.add_argument_group("Output")
    output.add_argument("--output", type=str | None, default=None, help="JSON file for the record of the run")
    output.add_argument(
        "--item_scores", type=str | None, default=None, help="JSONL file for the scores of each item"
    )
    return parser


def run(arguments: Namespace) -> None:
    """Score the tasks, print a table, write the record."""
    from graphlora.records import RunRecord, data_hash
    from graphlora.training.loading import load_for_use
    from graphlora.training.measuring import peak_memory

    _check(arguments)
    started = time.perf_counter()
    examples, score = _with_harness(arguments) if arguments.harness != "none" else _with_graphlora(arguments)
    model: Any
    model, tokenizer, adapter = load_for_use(
        arguments.model, arguments.base_model, arguments.dtype, arguments.device
    )
    if arguments.with_base and adapter is None:
        raise GraphLoraError("--with_base needs an adapter; the model given is a base model already")
    metrics: dict[str, Any] = {}
    for task in examples:
        if arguments.with_base:
            with model.disable_adapter():
                metrics |= score(model, tokenizer, task, " (base)", None)
        metrics |= score(model, tokenizer, task, "", arguments.item_scores)
    _print_table(metrics)
    _print_comparisons(metrics)
    if arguments.output is not None:
        record = RunRecord.create(
            "evaluation",
            _config(arguments),
            metrics,
            model=adapter.base_model if adapter is not None else arguments.model,
            seed=arguments.seed,
            device=str(model.device),
            dtype=str(model.dtype).removeprefix("torch."),
            wall_time=time.perf_counter() - started,
            peak_memory=peak_memory(model.device),
            data_hash=data_hash([item for items in examples.values() for item in items]),
        )
        print(f"record: {record.write(Path(arguments.output))}")


def _check(arguments: Namespace) -> None:
    if arguments.item_scores and len(arguments.task) > 1:
        raise GraphLoraError(f"--item_scores takes one task at a time; {len(arguments.task)} were given")
    if arguments.harness == "none":
        for option, given in (
            ("--batch_size", arguments.batch_size is not None),
            ("--compare", arguments.compare),
        ):
            if given:
                raise GraphLoraError(f"{option} needs --harness lm-eval")
    elif arguments.scoring != "cloze":
        raise GraphLoraError(f"--harness lm-eval scores cloze only; --scoring is {arguments.scoring!r}")


def _config(arguments: Namespace) -> dict[str, Any]:
    """Everything that decides the run; options of the harness only where it scored."""
    left_out = {"output", "item_scores", "debug"}
    if arguments.harness == "none":
        left_out |= {"harness", "batch_size", "compare"}
    return {key: value for key, value in arguments.as_dict().items() if key not in left_out}


def _with_graphlora(arguments: Namespace) -> tuple[dict[str, Any], Score]:
    """Examples of every task, and how one is scored: model, tokenizer, task, its label's end, file for items."""
    from graphlora.tasks import load_choices

    options = {"data_dir": arguments.data_dir, "limit": arguments.limit, "seed": arguments.seed}
    examples = {task: load_choices(task, arguments.split, **options) for task in arguments.task}

    def score(model: Any, tokenizer: Any, task: str, suffix: str, path: str | None) -> dict[str, Any]:
        from graphlora.evaluation.multiple_choice import summarize, write_items

        results = _own_results(model, tokenizer, examples[task], arguments)
        if path is not None:
            write_items(results, path)
        return {f"{task}{suffix}": summarize(results)}

    return examples, score


def _with_harness(arguments: Namespace) -> tuple[dict[str, Any], Score]:
    """The same for lm-evaluation-harness; its own tasks have no examples here."""
    from graphlora.evaluation.harness_tasks import load_harness_tasks

    options = {"data_dir": arguments.data_dir, "limit": arguments.limit, "seed": arguments.seed}
    tasks = {task.name: task for task in load_harness_tasks(arguments.task, arguments.split, **options)}
    for name, task in tasks.items():
        for option, value in (("--compare", arguments.compare), ("--item_scores", arguments.item_scores)):
            if value and task.examples is None:
                raise GraphLoraError(
                    f"{option} needs items of graphlora's tasks; {name!r} is the harness's own"
                )

    def score(model: Any, tokenizer: Any, task: str, suffix: str, path: str | None) -> dict[str, Any]:
        from graphlora.evaluation.harness import BATCH_SIZE, compared, run_harness
        from graphlora.evaluation.multiple_choice import summarize, write_items

        results = run_harness(
            model,
            tokenizer,
            [tasks[task]],
            batch_size=BATCH_SIZE if arguments.batch_size is None else arguments.batch_size,
            limit=arguments.limit,
            truncate=arguments.truncate,
        )
        if path is not None:
            write_items(results[task].items or (), path)
        metrics = {f"{name}{suffix}": result.summary for name, result in results.items()}
        if arguments.compare:
            own = _own_results(model, tokenizer, tasks[task].examples, arguments)
            metrics[f"{task}{suffix}"]["comparison"] = compared(results[task].items or (), own)
            metrics[f"{task}{suffix} (graphlora)"] = summarize(own)
        return metrics

    return {name: task.examples or () for name, task in tasks.items()}, score


def _own_results(model: Any, tokenizer: Any, examples: Any, arguments: Namespace) -> list[Any]:
    from graphlora.evaluation.multiple_choice import score_examples

    return score_examples(
        model,
        tokenizer,
        examples,
        arguments.scoring,
        tokens_per_batch=arguments.tokens_per_batch,
        truncate=arguments.truncate,
    )


def _print_table(metrics: dict[str, Any]) -> None:
    width = max(20, *(len(name) + 4 for name in metrics))
    print(f"{'task':<{width}} {'n':>6} {'acc':>8} {'acc_norm':>9} {'stderr':>8}")
    for name, summary in metrics.items():
        _print_row(name, summary, width)
        if "acc" not in summary:
            _print_metrics(summary)
        for group in ("domains", "kinds"):
            for part, values in summary.get(group, {}).items():
                _print_row(f"  {part}", values, width)


def _print_row(name: str, values: dict[str, Any], width: int) -> None:
    acc, norm = values.get("acc"), values.get("acc_norm")
    error = values.get("acc_norm_stderr", values.get("acc_stderr"))
    cells = [f"{value:.4f}" if value is not None else "-" for value in (acc, norm, error)]
    count = values["n"] if values["n"] is not None else "-"
    print(f"{name:<{width}} {count:>6} {cells[0]:>8} {cells[1]:>9} {cells[2]:>8}")


def _print_metrics(summary: dict[str, Any]) -> None:
    """Metrics of the harness's own tasks that are not accuracies."""
    for metric, value in summary.items():
        if isinstance(value, float) and metric != "task_version":
            print(f"  {metric}: {value:.4f}")


def _print_comparisons(metrics: dict[str, Any]) -> None:
    """What lm-evaluation-harness and graphlora disagree on."""
    for name, summary in metrics.items():
        if (comparison := summary.get("comparison")) is None:
            continue
        different = comparison["different"]
        print(
            f"{name}: log-likelihoods of lm-eval and graphlora differ by at most {comparison['largest_gap']:.2g}; "
            f"picks differ on {len({item['id'] for item in different})} of {summary['n']} items"
        )
        for item in different[:SHOWN_ITEMS]:
            print(
                f"  {item['id']}: {item['metric']} picks {item['harness']} with lm-eval and {item['own']} with "
                f"graphlora; right is {item['gold']}"
            )
        if len(different) > SHOWN_ITEMS:
            print(f"  and {len(different) - SHOWN_ITEMS} more; --output has all")
