"""`graphlora evaluate`: accuracy of an adapter or a base model."""

from __future__ import annotations

import time
from pathlib import Path
from typing import Any, Literal

from jsonargparse import ArgumentParser, Namespace

from graphlora.cli.parsing import add_model_options, make_parser
from graphlora.errors import GraphLoraError

DESCRIPTION = """\
Accuracy on multiple-choice tasks, by the likelihood of the answers' texts (cloze: acc, and acc_norm per
character, as lm-evaluation-harness defines them) or of their letters (letter). Takes an adapter's directory
or a base model; --with_base measures both, so that the gain is seen at once."""
EXAMPLE = """
graphlora evaluate runs/arc --task arc_easy --with_base
graphlora evaluate HuggingFaceTB/SmolLM2-135M-Instruct --task arc_easy boolq --limit 500
graphlora evaluate runs/mine --task my_rows.jsonl --split all --output scores.json
"""


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
    from graphlora.tasks import load_examples
    from graphlora.training.loading import load_for_use
    from graphlora.training.measuring import peak_memory

    if arguments.item_scores and len(arguments.task) > 1:
        raise GraphLoraError(f"--item_scores takes one task at a time; {len(arguments.task)} were given")
    started = time.perf_counter()
    options = {"data_dir": arguments.data_dir, "limit": arguments.limit, "seed": arguments.seed}
    examples = {task: load_examples(task, arguments.split, **options) for task in arguments.task}
    model: Any
    model, tokenizer, adapter = load_for_use(
        arguments.model, arguments.base_model, arguments.dtype, arguments.device
    )
    if arguments.with_base and adapter is None:
        raise GraphLoraError("--with_base needs an adapter; the model given is a base model already")
    metrics: dict[str, Any] = {}
    for task, items in examples.items():
        if arguments.with_base:
            with model.disable_adapter():
                metrics[f"{task} (base)"] = _score(model, tokenizer, items, arguments, None)
        metrics[task] = _score(model, tokenizer, items, arguments, arguments.item_scores)
    _print_table(metrics)
    if arguments.output is not None:
        config = {
            key: value
            for key, value in arguments.as_dict().items()
            if key not in ("output", "item_scores", "debug")
        }
        record = RunRecord.create(
            "evaluation",
            config,
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


def _score(model: Any, tokenizer: Any, items: Any, arguments: Namespace, path: str | None) -> dict[str, Any]:
    from graphlora.evaluation.multiple_choice import score_examples, summarize, write_items

    results = score_examples(
        model,
        tokenizer,
        items,
        arguments.scoring,
        tokens_per_batch=arguments.tokens_per_batch,
        truncate=arguments.truncate,
    )
    if path is not None:
        write_items(results, path)
    return summarize(results)


def _print_table(metrics: dict[str, Any]) -> None:
    width = max(20, *(len(name) + 4 for name in metrics))
    print(f"{'task':<{width}} {'n':>6} {'acc':>8} {'acc_norm':>9} {'stderr':>8}")
    for name, summary in metrics.items():
        _print_row(name, summary, width)
        for group in ("domains", "kinds"):
            for part, values in summary.get(group, {}).items():
                _print_row(f"  {part}", values, width)


def _print_row(name: str, values: dict[str, Any], width: int) -> None:
    norm, error = values.get("acc_norm"), values.get("acc_norm_stderr", values.get("acc_stderr"))
    cells = [f"{value:.4f}" if value is not None else "-" for value in (values["acc"], norm, error)]
    print(f"{name:<{width}} {values['n']:>6} {cells[0]:>8} {cells[1]:>9} {cells[2]:>8}")
