"""`graphlora import`: an adapter from a checkpoint of the paper's authors."""

from __future__ import annotations

from jsonargparse import ArgumentParser, Namespace

from graphlora.cli.parsing import make_parser

DESCRIPTION = """\
Turn a checkpoint that the released code of the paper wrote (adapter_model.bin with its config) into an
adapter for PEFT with the preset "released". Those files hold no graph: give the one it was trained with, or
it is rebuilt from the trained weights, which may differ, and the command says so."""
EXAMPLE = """
graphlora import authors/qwen2-arc runs/imported --base_model Qwen/Qwen2-7B
graphlora import authors/qwen2-arc runs/imported --base_model Qwen/Qwen2-7B --graph '[[0, 1], [2, 5]]'
"""


def build_parser() -> ArgumentParser:
    """Parser of the command."""
    parser = make_parser("graphlora import SOURCE OUTPUT [options]", DESCRIPTION, EXAMPLE)
    parser.add_argument("source", type=str, help="directory of the authors' checkpoint")
    parser.add_argument("output", type=str, help="directory for the adapter")
    parser.add_argument(
        "--base_model",
        type=str | None,
        default=None,
        help="base model, if not the one that the checkpoint names",
    )
    parser.add_argument(
        "--graph",
        type=list[list[int]] | str | None,
        default=None,
        help="graph trained with: edges between experts, or a .json or .safetensors file",
    )
    return parser


def run(arguments: Namespace) -> None:
    """Import and say where the adapter is."""
    from graphlora.tuner.import_authors import import_checkpoint

    imported = import_checkpoint(
        arguments.source, arguments.output, base_model=arguments.base_model, graph=arguments.graph
    )
    for note in imported.notes:
        print(f"note: {note}")
    print(f"adapter: {arguments.output} ({imported.num_layers} FFN blocks)")
    print(f"next: graphlora info {arguments.output}")
