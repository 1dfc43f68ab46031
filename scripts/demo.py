"""The demo: fine-tune SmolLM2-135M-Instruct with GraphLoRA on the embedded quiz, and show what was learned.

Plain LoRA with the same number of trained parameters and the same steps stands beside it. Everything is written under
`demo/`; nothing is fetched here (`make demo` fetches the model first).
"""

import argparse
import json
import shutil
import sys
import time
import warnings
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parent.parent
MODEL = ROOT / "models" / "SmolLM2-135M-Instruct"
RESULTS = "results.json"
# What the demo writes into its output folder, and what an earlier demo's folder is cleared of.
OWN_FOLDERS = ("graphlora", "lora")
OWN_FILES = ("expert_load.png", "expert_graph.png", RESULTS)
NUM_SHOWN = 5
WIDTH = 78

# What fits into ten minutes on two slow cores: the upper half of the layers (backward stops there), part of the rows.
QUICK = {"layers_to_transform": list(range(15, 30)), "train_limit": 1600}
QUICK_TEST = 240
GRAPHLORA = {"method": "graphlora", "num_experts": 8, "top_k": 2, "r": 4, "lora_alpha": 8}
TRAINING = {
    "task": "quiz",
    "num_train_epochs": 1,
    "per_device_train_batch_size": 16,
    "learning_rate": 2e-3,
    "lr_scheduler_type": "linear",
    "train_sampling_strategy": "group_by_length",
    "append_eos": True,
    "eval_strategy": "no",
    "load_best_model_at_end": False,
    "logging_steps": 0.25,
    "seed": 0,
}


def main() -> None:
    """Run the demo."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--model", type=Path, default=MODEL, help="the base model's directory")
    parser.add_argument(
        "--output",
        type=Path,
        default=ROOT / "demo",
        help="where adapters and pictures go: a new folder, an empty one, or an earlier demo's",
    )
    parser.add_argument(
        "--full",
        action="store_true",
        help="all layers, all training rows, all test questions (twice as long)",
    )
    options = parser.parse_args()
    if not (options.model / "config.json").is_file():
        sys.exit(f"no model in {options.model}: run `make model` first")
    prepare_output(options.output)
    started = time.perf_counter()
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", FutureWarning)
        results = run(options.model, options.output, options.full)
    print_results(results, options.output, time.perf_counter() - started)


def prepare_output(output: Path) -> None:
    """Clear what an earlier demo left in its output folder, and mark the folder as a demo's.

    Raises:
        SystemExit: There is something else; nothing was deleted.
    """
    if output.exists() and not output.is_dir():
        sys.exit(f"{output} is not a folder; give --output a new or empty one")
    if output.exists() and any(output.iterdir()) and not is_demo(output):
        sys.exit(f"{output} holds files that are not an earlier demo's; give --output a new or empty folder")
    output.mkdir(parents=True, exist_ok=True)
    for name in (*OWN_FOLDERS, *OWN_FILES):
        place = output / name
        if place.is_dir() and not place.is_symlink():
            shutil.rmtree(place)
        else:
            place.unlink(missing_ok=True)
    # So that a demo that was interrupted is recognized too.
    (output / RESULTS).write_text(json.dumps(dict.fromkeys(OWN_FOLDERS)), encoding="utf-8")


def is_demo(folder: Path) -> bool:
    """Whether the folder holds the results of a demo."""
    try:
        results = json.loads((folder / RESULTS).read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return False
    return isinstance(results, dict) and results.keys() >= set(OWN_FOLDERS)


def run(model: Path, output: Path, full: bool) -> dict[str, Any]:
    """Measure the base model, train both methods, measure them on the same questions."""
    from graphlora.evaluation.multiple_choice import score_examples, summarize
    from graphlora.tasks import load_examples
    from graphlora.training import Recipe, train
    from graphlora.training.loading import load_base_model, load_tokenizer, pick_device, pick_dtype

    say("The base model on the held-out questions")
    test = load_examples("quiz", "test", limit=None if full else QUICK_TEST)
    tokenizer = load_tokenizer(str(model))
    device = pick_device("auto")
    base = load_base_model(str(model), pick_dtype("auto", device)).to(device)
    before = {how: summarize(score_examples(base, tokenizer, test, how)) for how in ("cloze", "letter")}
    scope = {} if full else QUICK
    linear = linear_layers(base, scope.get("layers_to_transform"))
    per_rank = sum(layer.in_features + layer.out_features for layer in linear.values())
    names = sorted({name.rpartition(".")[2] for name in linear})
    del base

    common = TRAINING | scope | {"model": str(model)}
    say("Fine-tuning with GraphLoRA")
    ours = train(Recipe(**common, **GRAPHLORA, output_dir=str(output / "graphlora")))
    after = summarize(score_examples(ours.model, tokenizer, test, "cloze"))
    trained = ours.metrics["num_trained"]
    stats = ours.model.base_model.routing_stats()
    routing = routing_by_domain(ours.model, tokenizer, test)
    draw(stats, routing, output)
    answers = answer(ours.model, tokenizer, test)

    say("Fine-tuning with plain LoRA, same number of parameters and steps")
    rank = round(trained / per_rank)
    plain = {"method": "lora", "r": rank, "lora_alpha": 2 * rank, "target_modules": names}
    lora = train(Recipe(**common, **plain, output_dir=str(output / "lora")))
    lora_after = summarize(score_examples(lora.model, tokenizer, test, "cloze"))
    return {
        "before": before, "graphlora": after, "lora": lora_after, "stats": stats, "answers": answers, "rank": rank,
        "domains": routing["domains"], "block": routing["block"],
        "trained": {"graphlora": trained, "lora": lora.metrics["num_trained"]},
        "seconds": {"graphlora": ours.metrics["train_seconds"], "lora": lora.metrics["train_seconds"]},
        "steps": ours.metrics["steps"],
    }  # fmt: skip


def linear_layers(model: Any, layers: list[int] | None) -> dict[str, Any]:
    """Linear layers that plain LoRA adapts, by name: those of the given transformer layers (None: of all)."""
    import torch

    chosen = {}
    for name, module in model.named_modules():
        _, _, rest = name.partition(".layers.")
        if (
            isinstance(module, torch.nn.Linear)
            and rest
            and (layers is None or int(rest.split(".")[0]) in layers)
        ):
            chosen[name] = module
    return chosen


def routing_by_domain(model: Any, tokenizer: Any, examples: list[Any]) -> dict[str, Any]:
    """Load of every expert per domain, in the block that tells the domains apart best; and the flow out of it."""
    import numpy as np
    import torch

    from graphlora.report.figures import expert_flow

    domains = sorted({example.domain for example in examples})
    loads: dict[str, Any] = {}
    kept: dict[str, list[Any]] = {}
    model.eval()
    for example in examples[: 12 * len(domains)]:
        ids = tokenizer(example.prompt, return_tensors="pt").to(model.device)
        with torch.no_grad(), model.base_model.record_routing() as record:
            model(**ids)
        for name, routing in record.items():
            index, weights = routing.top_k_index.cpu(), routing.top_k_weights.cpu()
            table = loads.setdefault(name, np.zeros((len(domains), routing.router_probs.shape[1])))
            np.add.at(table[domains.index(example.domain)], index.numpy().ravel(), weights.numpy().ravel())
            kept.setdefault(name, []).append((index.numpy(), weights.numpy()))
    shares = {name: table / table.sum(axis=1, keepdims=True) for name, table in loads.items()}
    names = list(shares)
    block = max(names[:-1], key=lambda name: float(shares[name].std(axis=0).mean()))
    following = names[names.index(block) + 1]
    parts = [np.concatenate([step[i] for step in kept[name]]) for name in (block, following) for i in (0, 1)]
    flow = expert_flow(*parts, num_experts=shares[block].shape[1])
    return {"block": block, "domains": dict(zip(domains, shares[block].tolist(), strict=True)), "flow": flow}


def draw(stats: dict[str, Any], routing: dict[str, Any], output: Path) -> None:
    """The two pictures."""
    from graphlora.report.figures import expert_flow_figure, expert_load_figure, save_figure

    loads = {name: block["expert_load"] for name, block in stats.items()}
    save_figure(
        expert_load_figure(loads, "Expert load after training on the quiz"), output / "expert_load.png"
    )
    block = stats[routing["block"]]
    title = f"Experts of {routing['block']}: load in training, flow on held-out questions"
    figure = expert_flow_figure(block["adjacency"], block["expert_load"], routing["flow"], title)
    save_figure(figure, output / "expert_graph.png")


def answer(model: Any, tokenizer: Any, examples: list[Any]) -> list[tuple[str, str, str]]:
    """(question, answer, right answer) of a few held-out questions, one of each domain first."""
    import torch

    chosen = list({example.domain: example for example in reversed(examples)}.values())[:NUM_SHOWN]
    rows = []
    for example in chosen:
        ids = tokenizer(example.prompt, return_tensors="pt").to(model.device)
        with torch.no_grad():
            out = model.generate(
                **ids, max_new_tokens=12, do_sample=False, pad_token_id=tokenizer.pad_token_id
            )
        text = tokenizer.decode(out[0, ids["input_ids"].shape[1] :], skip_special_tokens=True)
        question = example.prompt.removeprefix("Question: ").removesuffix("\nAnswer:")
        rows.append(
            (
                question,
                text.strip().splitlines()[0] if text.strip() else "",
                example.choices[example.gold].strip(),
            )
        )
    return rows


def print_results(results: dict[str, Any], output: Path, seconds: float) -> None:
    """Everything that was learned, on one screen or two."""
    before, after, lora = results["before"], results["graphlora"], results["lora"]
    best = max(before["cloze"]["acc_norm"], before["letter"]["acc"])
    say("What was learned")
    print(
        f"{'accuracy on held-out questions':36}{'all':>9}{'seen facts,':>14}{'unseen':>9}{'parameters':>12}"
    )
    print(f"{'':36}{'':>9}{'new wording':>14}{'facts':>9}{'trained':>12}")
    rows = [
        ("base model, letter scoring", before["letter"], "acc", "-"),
        ("base model, cloze scoring", before["cloze"], "acc_norm", "-"),
        (f"plain LoRA (rank {results['rank']}), cloze", lora, "acc_norm", f"{results['trained']['lora']:,}"),
        ("GraphLoRA, cloze", after, "acc_norm", f"{results['trained']['graphlora']:,}"),
    ]
    for name, summary, key, trained in rows:
        kinds = [summary["kinds"][kind][key] for kind in ("seen", "unseen")]
        cells = f"{summary[key]:9.1%}{kinds[0]:14.1%}{kinds[1]:9.1%}"
        print(f"{name:36}{cells}{trained:>12}")
    stderr = after["acc_norm_stderr"]
    print(
        f"\n{after['n']} questions, so one standard error is {stderr:.1%}; {results['steps']} steps of training each."
    )
    print(
        f"GraphLoRA gains {100 * (after['acc_norm'] - best):.1f} points over the base model's better scoring."
    )
    times = results["seconds"]
    print(
        f"Training took {times['graphlora']:.0f} s with GraphLoRA and {times['lora']:.0f} s with plain LoRA."
    )
    print_domains(results)
    print_loads(results["stats"])
    say("A few held-out questions, answered by the tuned model")
    for question, text, right in results["answers"]:
        print(f"{question}\n    {text}{'' if text == right else f'   (right: {right})'}")
    print_places(results, output, seconds)


def print_domains(results: dict[str, Any]) -> None:
    """Accuracy per domain, and which experts serve it."""
    after, before = results["graphlora"]["domains"], results["before"]["cloze"]["domains"]
    experts = next(iter(results["domains"].values()))
    head = "".join(f"{f'e{i}':>5}" for i in range(len(experts)))
    say(f"Domains: accuracy before and after, and % of each expert in {results['block']}")
    print(f"{'':12}{'before':>8}{'after':>8}   {head}")
    for domain, shares in results["domains"].items():
        bars = "".join(f"{100 * share:5.0f}" for share in shares)
        print(f"{domain:12}{before[domain]['acc_norm']:8.1%}{after[domain]['acc_norm']:8.1%}   {bars}")


def print_loads(stats: dict[str, Any]) -> None:
    """Expert load per layer."""
    say("Expert load per layer (% of the routing weight; even would be "
        f"{100 / len(next(iter(stats.values()))['expert_load']):.1f})")  # fmt: skip
    for name, block in stats.items():
        load = block["expert_load"]
        bars = "".join(f"{100 * share:6.1f}" for share in load)
        dead = f"  {block['dead_experts']} dead" if block["dead_experts"] else ""
        print(f"{name.removeprefix('model.').removesuffix('.mlp'):12}{bars}{dead}")


def print_places(results: dict[str, Any], output: Path, seconds: float) -> None:
    """Where things are, and what to try next."""
    (output / RESULTS).write_text(json.dumps(results, indent=1, default=list), encoding="utf-8")
    place = output.relative_to(Path.cwd()) if output.is_relative_to(Path.cwd()) else output
    program = Path(sys.executable).parent / "graphlora"
    program = program.relative_to(Path.cwd()) if program.is_relative_to(Path.cwd()) else program
    say("Where things are")
    print(
        f"adapter    {place}/graphlora  (and {place}/lora to compare; each with config.yaml and record.json)"
    )
    print(f"pictures   {place}/expert_load.png, {place}/expert_graph.png")
    print(f"numbers    {place}/results.json")
    say("Three commands to try next")
    print(f"{program} info {place}/graphlora")
    print(f"{program} generate {place}/graphlora --prompt 'What is the capital of Peru?'")
    print(
        f"{program} train --config {place}/graphlora/config.yaml --num_train_epochs 3 --output_dir runs/longer"
    )
    print(f"\nDone in {seconds / 60:.1f} minutes.")


def say(title: str) -> None:
    """A heading."""
    print(f"\n{title}\n{'-' * min(len(title), WIDTH)}", flush=True)


if __name__ == "__main__":
    main()
