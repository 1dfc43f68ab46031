"""`graphlora bench`: how fast and how big a model will be with an adapter, on this machine."""

from __future__ import annotations

import json
from typing import TYPE_CHECKING, Any, Literal

from jsonargparse import SUPPRESS, ArgumentParser, Namespace

from graphlora.cli.parsing import make_parser
from graphlora.errors import GraphLoraError

if TYPE_CHECKING:
    from peft import PeftConfig

    from graphlora.benchmark.layer import Setting
    from graphlora.benchmark.prediction import Measured, Prediction

DESCRIPTION = """\
How fast and how big will my model be with this configuration on this machine? Measures one decoder layer with
random weights (only the model's config is read), what surrounds the layers, and the optimizer, and puts the
training step together: time, tokens per second, peak memory. The frozen model and plain LoRA of the same rank
in PEFT stand beside it. --check runs the whole model too and shows what the prediction was worth."""
EXAMPLE = """
graphlora bench meta-llama/Meta-Llama-3-8B --batch_size 8 --length 1024
graphlora bench path/to/model --r 16 --num_experts 16 --batch_size 1 --length 4096 --gradient_checkpointing
graphlora bench meta-llama/Meta-Llama-3-8B --batch_size 8 --length 512 --step_mode compile
graphlora bench path/to/model --check --json
"""
# Options of the adapter that decide its cost; all others go into --adapter_args.
ADAPTER_OPTIONS: dict[str, tuple[Any, str]] = {
    "preset": (Literal["graphlora", "paper", "released"], "preset of GraphLoRA"),
    "num_experts": (int, "experts per FFN block"),
    "top_k": (int, "experts that each token uses"),
    "r": (int, "LoRA rank, of plain LoRA too"),
    "lora_dropout": (float, "LoRA dropout, of plain LoRA too"),
    "router_hidden_size": (int, "width of the router"),
    "backend": (str, "auto, eager, torch or triton"),
}
NAMES = {"frozen": "frozen", "lora": "PEFT LoRA", "graphlora": "GraphLoRA"}
_DEFAULT_RANK = 8
COMPILER = "inductor"


def build_parser() -> ArgumentParser:
    """Parser of the command."""
    parser = make_parser("graphlora bench MODEL [options]", DESCRIPTION, EXAMPLE)
    parser.add_argument("model", type=str, help="directory with a config.json, or hub id")
    parser.add_argument("--batch_size", type=int, default=4, help="rows per step")
    parser.add_argument("--length", type=int, default=512, help="tokens per row")
    parser.add_argument("--gradient_checkpointing", action="store_true", help="recompute activations")
    parser.add_argument(
        "--step_mode",
        type=Literal["eager", "compile"],
        default="eager",
        help="compile: decoder layers and loss by torch.compile, as graphlora train has it for long runs on a GPU",
    )
    parser.add_argument("--dtype", type=str, default="auto", help="auto, float32, bfloat16 or float16")
    parser.add_argument("--device", type=str, default="auto", help="auto, cpu, cuda, cuda:1, ...")
    parser.add_argument("--iterations", type=int, default=10, help="timed iterations; medians are shown")
    parser.add_argument("--check", action="store_true", help="run the whole model too")
    parser.add_argument("--json", action="store_true", help="print one JSON object")
    group = parser.add_argument_group("Adapter (left out: the preset's value)")
    for name, (kind, text) in ADAPTER_OPTIONS.items():
        group.add_argument(f"--{name}", type=kind, default=SUPPRESS, help=text)
    group.add_argument(
        "--adapter_args", type=dict[str, Any], default={}, help="any other field of GraphLoraConfig"
    )
    return parser


def run(arguments: Namespace) -> None:
    """Measure, predict, print."""
    for name in ("batch_size", "length", "iterations"):
        if getattr(arguments, name) < 1:
            raise GraphLoraError(f"--{name} is {getattr(arguments, name)}; it must be at least 1")
    given = {name: arguments[name] for name in ADAPTER_OPTIONS if name in arguments}
    facts = bench(arguments, given | arguments.adapter_args)
    print(json.dumps(facts, indent=2) if arguments.json else as_text(facts))


def bench(arguments: Namespace, options: dict[str, Any]) -> dict[str, Any]:
    """Predictions, and measurements where asked for, as JSON values."""
    from tqdm import tqdm

    from graphlora.benchmark.prediction import measure_whole, predict
    from graphlora.tuner.compiled_layers import compiler_errors, reason_of

    setting = make_setting(arguments)
    found = {}
    try:
        for kind, adapter in (bar := tqdm(adapters(options).items(), unit="model")):
            bar.set_description(f"{NAMES[kind]}, one layer")
            prediction = predict(setting, adapter)
            measured = None
            if arguments.check:
                bar.set_description(f"{NAMES[kind]}, whole model")
                measured = measure_whole(setting, adapter)
            found[kind] = _facts(prediction, measured)
    except compiler_errors() as error:
        raise GraphLoraError(
            f"torch.compile failed ({reason_of(error)}); set --step_mode to eager"
        ) from error
    from graphlora.evaluation.efficiency import device_name

    return {
        "model": arguments.model,
        "num_layers": int(setting.config.get_text_config().num_hidden_layers),
        "batch_size": setting.batch_size,
        "length": setting.length,
        "device": device_name(setting.device),
        "dtype": str(setting.dtype).removeprefix("torch."),
        "gradient_checkpointing": setting.gradient_checkpointing,
        "step_mode": arguments.step_mode,
        "adapter": options,
        "candidates": found,
    }


def make_setting(arguments: Namespace) -> Setting:
    """What is asked about, from the command line's words.

    Raises:
        GraphLoraError: no such model config, device or dtype; rows longer than the model's window.
    """
    from graphlora.benchmark.layer import Setting
    from graphlora.training.loading import load_config, pick_device, pick_dtype

    device = pick_device(arguments.device)
    config = load_config(arguments.model)
    window = getattr(config.get_text_config(), "max_position_embeddings", None)
    if window is not None and arguments.length > window:
        raise GraphLoraError(
            f"--length is {arguments.length}, but {arguments.model} takes {window} tokens; give at most {window}"
        )
    return Setting(
        config,
        arguments.batch_size,
        arguments.length,
        device,
        pick_dtype(arguments.dtype, device),
        arguments.gradient_checkpointing,
        arguments.iterations,
        COMPILER if arguments.step_mode == "compile" else None,
    )


def adapters(options: dict[str, Any]) -> dict[str, PeftConfig | None]:
    """The frozen model, plain LoRA on the same projections with PEFT's defaults, GraphLoRA with the options.

    Raises:
        GraphLoraError: an option that GraphLoraConfig does not have, or a value that it refuses.
    """
    from peft import LoraConfig

    from graphlora import GraphLoraConfig
    from graphlora.training.suggestion import suggestion
    from graphlora.tuner.config import config_field_names

    for name in options:
        if name not in config_field_names():
            known = config_field_names()
            raise GraphLoraError(f"unknown option {name} of the adapter{suggestion(name, known)}")
    plain = LoraConfig(
        task_type="CAUSAL_LM",
        r=options.get("r", _DEFAULT_RANK),
        lora_dropout=options.get("lora_dropout", 0.0),
        target_modules="all-linear",
    )
    return {"frozen": None, "lora": plain, "graphlora": GraphLoraConfig(task_type="CAUSAL_LM", **options)}


def _facts(prediction: Prediction, measured: Measured | None) -> dict[str, Any]:
    facts: dict[str, Any] = {"predicted": prediction.as_dict()}
    if measured is not None:
        facts["measured"] = {"step": measured.step, "peak": measured.peak}
    return facts


def as_text(facts: dict[str, Any]) -> str:
    """The table for a terminal."""
    candidates = facts["candidates"]
    predicted = {kind: values["predicted"] for kind, values in candidates.items()}
    parts = {kind: values["parts"] for kind, values in predicted.items()}
    checkpointing = ", gradient checkpointing" if facts["gradient_checkpointing"] else ""
    compiled = ", compiled" if facts["step_mode"] == "compile" else ""
    lines = [
        f"{facts['model']}: {facts['num_layers']} layers, {facts['batch_size']} x {facts['length']} tokens, "
        f"{facts['dtype']} on {facts['device']}{checkpointing}{compiled}",
        "",
        f"{'':<30}" + "".join(f"{NAMES[kind]:>14}" for kind in candidates),
    ]

    def row(label: str, values: dict[str, str]) -> None:
        lines.append(f"{label:<30}" + "".join(f"{values[kind]:>14}" for kind in candidates))

    row("one layer, forward (ms)", {k: f"{p['forward']:.2f}" for k, p in parts.items()})
    row("one layer, backward (ms)", {k: f"{p['backward']:.2f}" for k, p in parts.items()})
    row("embedding, head, loss (ms)", {k: f"{p['rest']:.2f}" for k, p in parts.items()})
    row("optimizer (ms)", {k: f"{p['optimizer']:.2f}" for k, p in parts.items()})
    row("training step (ms)", {k: f"{p['step']:.1f}" for k, p in predicted.items()})
    frozen = predicted["frozen"]["step"]
    row("  relative to frozen", {k: f"{p['step'] / frozen:.2f}" for k, p in predicted.items()})
    row("tokens per second", {k: f"{p['tokens_per_second']:,.0f}" for k, p in predicted.items()})
    lines.append("")
    row("trained parameters", {k: f"{p['trained']:,}" for k, p in predicted.items()})
    row("frozen weights (GiB)", {k: _gib(p["weights"]) for k, p in predicted.items()})
    row("adapter and optimizer (GiB)", {k: _gib(p["adapters"]) for k, p in predicted.items()})
    row("activations (GiB)", {k: _gib(p["activations"]) for k, p in predicted.items()})
    row("peak memory (GiB)", {k: _gib(p["peak"]) for k, p in predicted.items()})
    if all("measured" in values for values in candidates.values()):
        measured = {kind: values["measured"] for kind, values in candidates.items()}
        lines.append("")
        row("measured step (ms)", {k: f"{m['step']:.1f}" for k, m in measured.items()})
        row("measured peak (GiB)", {k: _gib(m["peak"]) for k, m in measured.items()})
    return "\n".join(lines)


def _gib(num_bytes: int) -> str:
    return f"{num_bytes / 2**30:.2f}" if num_bytes >= 2**27 else f"{num_bytes / 2**30:.4f}"
