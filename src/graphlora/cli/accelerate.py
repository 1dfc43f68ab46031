"""`graphlora accelerate`: the configs for `accelerate launch` that come with the package."""

from __future__ import annotations

from pathlib import Path

from jsonargparse import ArgumentParser, Namespace

from graphlora.cli.parsing import make_parser
from graphlora.errors import GraphLoraError
from graphlora.training.suggestion import suggestion

FOLDER = Path(__file__).parents[1] / "accelerate_configs"
DESCRIPTION = """\
Print the path of a config for `accelerate launch`, to train on several GPUs; without a name, list them. To change one
(number of GPUs, several machines), copy it, or give accelerate's own options, which come before its config."""
EXAMPLE = """
accelerate launch --config_file "$(graphlora accelerate ddp)" -m graphlora train --config recipe.yaml
accelerate launch --config_file "$(graphlora accelerate fsdp2)" --num_processes 8 -m graphlora train --config r.yaml
cp "$(graphlora accelerate fsdp2)" my.yaml
"""


def build_parser() -> ArgumentParser:
    """Parser of the command."""
    parser = make_parser("graphlora accelerate [NAME]", DESCRIPTION, EXAMPLE)
    parser.add_argument("name", type=str | None, nargs="?", help=", ".join(config_files()))
    return parser


def run(arguments: Namespace) -> None:
    """Print the path of one config, or what there is."""
    files = config_files()
    if arguments.name is None:
        print("\n".join(f"{name:<14} {_purpose(path)}" for name, path in files.items()))
        return
    name = arguments.name.removesuffix(".yaml")
    if name not in files:
        raise GraphLoraError(
            f"no config named {arguments.name!r}{suggestion(name, set(files))}; there are {', '.join(files)}"
        )
    print(files[name])


def config_files() -> dict[str, Path]:
    """Configs by name."""
    return {path.stem: path for path in sorted(FOLDER.glob("*.yaml"))}


def _purpose(path: Path) -> str:
    """The first sentences of its comment."""
    lines = path.read_text(encoding="utf-8").splitlines()
    comment = [line.removeprefix("# ") for line in lines[: lines.index("compute_environment: LOCAL_MACHINE")]]
    return " ".join(comment)
