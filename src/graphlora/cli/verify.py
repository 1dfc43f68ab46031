"""`graphlora verify`: whether an adapter is what it was when it was made, and still says what it said."""

from __future__ import annotations

import json
from pathlib import Path
from typing import TYPE_CHECKING, Any

from jsonargparse import ArgumentParser, Namespace

from graphlora.cli.parsing import make_parser
from graphlora.errors import GraphLoraError
from graphlora.training.adapter_files import read_adapter
from graphlora.training.manifest import MANIFEST_FILE, Manifest, compare_base, compare_files, read_manifest

if TYPE_CHECKING:
    from peft import PeftModel
    from transformers import PreTrainedTokenizerBase

DESCRIPTION = f"""\
Check an adapter against the {MANIFEST_FILE} that training wrote beside it: the SHA-256 of its files, its base
model, and its output. The output is computed again on this machine and compared with the recorded one:
exact (the same bits), within tolerance (another device, number of threads or version rounds differently), or
different. Nothing of a changed adapter is loaded.

exit code: 0 all that was checked is as recorded; 1 something differs; 2 it could not be checked
(no manifest, no such model), and the message says what to do."""
EXAMPLE = """
graphlora verify runs/arc
graphlora verify runs/arc --skip_output                      # the files and the base model's config only
graphlora verify downloaded/adapter --base_model models/base
graphlora verify trl-output/adapter --record                 # make a manifest for an adapter from elsewhere
"""
OK, CHANGED = "as recorded", "CHANGED"


def build_parser() -> ArgumentParser:
    """Parser of the command."""
    parser = make_parser("graphlora verify ADAPTER [options]", DESCRIPTION, EXAMPLE)
    parser.add_argument("adapter", type=str, help="directory of the adapter")
    parser.add_argument(
        "--base_model",
        type=str | None,
        default=None,
        help="base model, if not the one that the adapter names",
    )
    parser.add_argument("--device", type=str, default="auto", help="auto, cpu, cuda, cuda:1, ...")
    parser.add_argument(
        "--skip_output", action="store_true", help="do not load the base model; check hashes only"
    )
    parser.add_argument(
        "--record", action="store_true", help=f"write {MANIFEST_FILE} from the adapter as it is now"
    )
    parser.add_argument(
        "--dtype",
        type=str,
        default="auto",
        help="with --record: dtype of the base; otherwise the recorded one",
    )
    parser.add_argument("--json", action="store_true", help="print one JSON object")
    return parser


def run(arguments: Namespace) -> int:
    """Check, or record; the exit code."""
    adapter = Path(arguments.adapter)
    if not adapter.is_dir():
        raise GraphLoraError(f"no adapter directory at {adapter}; check the path")
    if arguments.record:
        return _record(adapter, arguments)
    manifest = read_manifest(adapter)
    facts: dict[str, Any] = {"adapter": str(adapter), "created": manifest.created}
    facts["files"] = compare_files(adapter, manifest)
    good = set(facts["files"].values()) == {OK}
    if good:
        facts["base"] = _check_base(adapter, manifest, arguments)
        good = facts["base"]["state"] != CHANGED
    if good and not arguments.skip_output:
        facts["output"] = _check_output(adapter, manifest, arguments)
        good = facts["output"]["state"] not in ("different", CHANGED)
    facts["verified"] = good
    print(json.dumps(facts, indent=2) if arguments.json else as_text(facts))
    return 0 if good else 1


def as_text(facts: dict[str, Any]) -> str:
    """What was found, for a terminal."""
    width = max(len(name) for name in facts["files"])
    lines = [f"{facts['adapter']}, recorded {facts['created']}"]
    lines += [
        f"  {name:<{width}}  {state if state == OK else state.upper()}"
        for name, state in facts["files"].items()
    ]
    for name in ("base", "output"):
        if name in facts:
            detail = f": {facts[name]['detail']}" if facts[name]["detail"] else ""
            lines.append(f"  {name:<{width}}  {facts[name]['state']}{detail}")
    bad = [name for name, state in facts["files"].items() if state != OK]
    if bad:
        lines.append(f"not verified: restore {', '.join(bad)} from where the adapter came from")
    elif not facts["verified"]:
        remedy = "is this the base model that it was trained on? Name another with --base_model"
        lines.append(f"not verified: {remedy}")
    else:
        lines.append("verified")
    return "\n".join(lines)


def _check_base(adapter: Path, manifest: Manifest, arguments: Namespace) -> dict[str, str]:
    """The base model's config against the recorded one."""
    from graphlora.training.loading import load_config

    name = _base_name(adapter, arguments)
    try:
        differences = compare_base(load_config(name), manifest)
    except GraphLoraError as error:
        if not arguments.skip_output:
            raise GraphLoraError(
                f"{error}; name the base model with --base_model, or use --skip_output"
            ) from error
        return {"state": "not checked", "detail": str(error)}
    return {
        "state": CHANGED if differences else OK,
        "detail": f"{name}: {', '.join(differences)}" if differences else name,
    }


def _check_output(adapter: Path, manifest: Manifest, arguments: Namespace) -> dict[str, str]:
    """The base model's weights and the output against the recorded ones."""
    from graphlora.training.loading import DTYPES
    from graphlora.training.reproducing import compare_output, sample_hash

    output = manifest.output
    if output is None:
        return {"state": "not recorded", "detail": manifest.reason or ""}
    if output.get("dtype") not in DTYPES:
        raise GraphLoraError(
            f"{adapter / MANIFEST_FILE}: output.dtype is {str(output.get('dtype'))[:40]!r}; expected one of "
            f"{', '.join(DTYPES)}. Restore the file from a copy, or use --skip_output"
        )
    model, tokenizer = _load(adapter, arguments, str(output["dtype"]), bool(output.get("load_in_4bit")))
    # Packing into 4 bits may differ from device to device.
    if not output.get("load_in_4bit") and manifest.base_weights not in (
        None,
        sample_hash(model.get_base_model()),
    ):
        return {
            "state": CHANGED,
            "detail": f"{_base_name(adapter, arguments)} has other weights than the recorded base",
        }
    state, detail = compare_output(model, tokenizer, output)
    return {"state": state, "detail": f"{detail}; recorded on {output.get('device')} in {output['dtype']}"}


def _record(adapter: Path, arguments: Namespace) -> int:
    """Write the manifest of an adapter as it is now."""
    from graphlora.training.loading import pick_device, pick_dtype
    from graphlora.training.reproducing import make_manifest

    dtype = str(pick_dtype(arguments.dtype, pick_device(arguments.device))).removeprefix("torch.")
    model, tokenizer = _load(adapter, arguments, dtype, load_in_4bit=False)
    print(f"wrote {make_manifest(adapter, model, tokenizer).write(adapter)}")
    return 0


def _load(
    adapter: Path, arguments: Namespace, dtype: str, load_in_4bit: bool
) -> tuple[PeftModel, PreTrainedTokenizerBase]:
    from graphlora.training.loading import DTYPES, load_adapter, load_base_model, load_tokenizer, pick_device

    name, device = _base_name(adapter, arguments), pick_device(arguments.device)
    tokenizer = load_tokenizer(name)
    base = load_base_model(name, DTYPES[dtype], device, load_in_4bit=load_in_4bit)
    return load_adapter(base, adapter, name), tokenizer


def _base_name(adapter: Path, arguments: Namespace) -> str:
    name = arguments.base_model or read_adapter(adapter).base_model
    if not isinstance(name, str):
        raise GraphLoraError(f"the adapter {adapter} does not name its base model; give --base_model")
    return name
