"""The wheel in a clean environment: what it holds, what it imports, its commands, its types.

Builds the wheel, makes an environment that has nothing but the wheel and what it declares, and uses it outside of the
source tree. CI runs it; `--out FOLDER` keeps wheel and environment, `--no-record` writes no record.
"""

from __future__ import annotations

import argparse
import os
import shutil
import subprocess
import sys
import tempfile
import zipfile
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from graphlora.errors import GraphLoraError
from reliability.record import ROOT, write_record
from reliability.tiny import recipe

PROMISE = (
    "The wheel works in a clean environment: it imports with its declared dependencies alone, every command starts, "
    "studies, quiz and type information are inside, a model trains and verifies."
)
TEST = "`python -m reliability.wheel`, in CI"
SOURCE = ROOT / "src" / "graphlora"
# Data that the package reads at run time, as patterns of files in the source tree.
DATA = ("py.typed", "studies/*.yaml", "tasks/quiz_data/*", "accelerate_configs/*.yaml")
TYPED = """
from graphlora import GraphLoraConfig
from graphlora.training import Recipe

config = GraphLoraConfig(num_experts=4)
reveal_type(config.num_experts)
reveal_type(Recipe.from_yaml)
GraphLoraConfig(num_experts="four")
"""


def main() -> int:
    """Builds, installs, checks, and writes the record."""
    parser = argparse.ArgumentParser(prog="python -m reliability.wheel", description=__doc__)
    parser.add_argument(
        "--out", type=Path, help="folder for wheel and environment; left out: a temporary one"
    )
    parser.add_argument("--python", default=sys.executable, help="Python of the environment")
    parser.add_argument("--no-record", action="store_true", help="only check")
    options = parser.parse_args()
    folder = options.out or Path(tempfile.mkdtemp())
    try:
        found = check(folder.resolve(), options.python)
    except GraphLoraError as error:
        sys.stderr.write(f"reliability: error: {error}\n")
        return 1
    finally:
        if options.out is None:
            shutil.rmtree(folder, ignore_errors=True)
    figure = (
        f"{found['files']} files, {found['data_files']} of data; {found['packages']} packages installed; "
        f"{found['modules']} modules imported, {found['commands']} commands started, trained and verified"
    )
    print(figure)
    if not options.no_record:
        print(write_record("wheel", PROMISE, TEST, figure, found))
    return 0


def check(folder: Path, python: str) -> dict[str, Any]:
    """Builds and checks the wheel in a folder; what was counted.

    Raises:
        GraphLoraError: A step failed; the message holds the end of its output.
    """
    _run([sys.executable, "-m", "pip", "wheel", "-q", "--no-deps", "-w", str(folder / "dist"), str(ROOT)])
    wheel = max((folder / "dist").glob("graphlora-*.whl"))
    names = set(zipfile.ZipFile(wheel).namelist())
    data = _check_contents(names)
    clean = folder / "clean"
    _run([python, "-m", "venv", "--clear", str(clean)])
    interpreter = str(clean / "bin" / "python")
    locked = ["-c", str(ROOT / "constraints.txt")]
    _run([interpreter, "-m", "pip", "install", "-q", "--disable-pip-version-check", *locked, str(wheel)])
    packages = _run(
        [interpreter, "-m", "pip", "list", "--disable-pip-version-check", "--format=freeze"]
    ).splitlines()
    _run([interpreter, "-m", "pip", "check"])
    modules = _check_imports(interpreter, names, folder)
    commands = _check_commands(clean, folder)
    _check_types(interpreter, folder)
    return {
        "files": len(names),
        "data_files": data,
        "packages": len(packages),
        "modules": modules,
        "commands": commands,
    }


def _check_contents(names: set[str]) -> int:
    """Every Python and data file of the source is in the wheel, and nothing beside the package."""
    wanted = {path for pattern in ("**/*.py", *DATA) for path in SOURCE.glob(pattern) if path.is_file()}
    expected = {f"graphlora/{path.relative_to(SOURCE).as_posix()}" for path in wanted}
    if missing := sorted(expected - names):
        raise GraphLoraError(f"the wheel lacks {', '.join(missing)}")
    if strange := sorted(name for name in names if not name.startswith(("graphlora/", "graphlora-"))):
        raise GraphLoraError(f"the wheel holds more than the package: {', '.join(strange)}")
    return sum(not path.name.endswith(".py") for path in wanted)


def _check_imports(python: str, names: set[str], folder: Path) -> int:
    """Imports every module but those that need an optional package; how many."""
    modules = sorted(
        name.removesuffix("/__init__.py").removesuffix(".py").replace("/", ".")
        for name in names
        if name.endswith(".py") and not name.endswith("__main__.py")
    )
    code = f"""
import importlib, sys
missing = []
for name in {modules!r}:
    try:
        importlib.import_module(name)
    except ModuleNotFoundError as error:
        missing.append(error.name)
print(len({modules!r}) - len(missing), *sorted(set(missing)))
"""
    count, *missing = _run([python, "-W", "ignore", "-c", code], folder).split()
    optional = {"triton", "matplotlib", "lm_eval", "ray", "trl", "gguf", "argcomplete"}
    if unknown := sorted({name.split(".")[0] for name in missing} - optional):
        raise GraphLoraError(f"modules of the wheel need {', '.join(unknown)}, which it does not declare")
    return int(count)


def _check_commands(clean: Path, folder: Path) -> int:
    """Starts every command, trains a tiny model and verifies the adapter; how many commands."""
    program = str(clean / "bin" / "graphlora")
    listing = _run(
        [str(clean / "bin" / "python"), "-c", "from graphlora.cli.main import COMMANDS; print(*COMMANDS)"],
        folder,
    )
    commands = listing.split()
    for command in commands:
        _run([program, command, "--help"], folder)
    _run([program, "--version"], folder)
    values = recipe(folder / "tiny")
    words = [
        program,
        "train",
        "--output_dir",
        str(folder / "adapter"),
        "--max_steps",
        "2",
        "--num_experts",
        "4",
    ]
    _run([*words, "--model", values["model"], "--task", values["task"], "--dtype", "float32"], folder)
    _run([program, "verify", str(folder / "adapter")], folder)
    _run([program, "info", str(folder / "adapter")], folder)
    return len(commands)


def _check_types(python: str, folder: Path) -> None:
    """A type checker knows the installed package's types, and refuses a wrong one."""
    (folder / "use.py").write_text(TYPED, encoding="utf-8")
    (folder / "pyrightconfig.json").write_text('{"include": ["use.py"]}', encoding="utf-8")
    words = [sys.executable, "-m", "pyright", "--pythonpath", python, "-p", str(folder)]
    said = subprocess.run(words, cwd=folder, capture_output=True, text=True, env=_environment()).stdout
    wanted = ('"config.num_experts" is "int"', 'Recipe"', "\"Literal['four']\"", "1 error")
    if absent := [text for text in wanted if text not in said]:
        raise GraphLoraError(f"pyright does not say {absent[0]!r} of the installed package: {said}")


def _run(words: Sequence[str], folder: Path | None = None) -> str:
    done = subprocess.run(words, cwd=folder, capture_output=True, text=True, env=_environment())
    if done.returncode:
        said = (done.stderr.strip() or done.stdout.strip())[-2000:]
        raise GraphLoraError(f"{' '.join(words[:4])} ... exited with {done.returncode}: {said}")
    return done.stdout


def _environment() -> dict[str, str]:
    """This process's environment without ways to the source tree."""
    kept = {name: value for name, value in os.environ.items() if name not in ("PYTHONPATH", "VIRTUAL_ENV")}
    return kept | {"HF_HUB_OFFLINE": "1", "CUDA_VISIBLE_DEVICES": ""}


if __name__ == "__main__":
    sys.exit(main())
