"""Pins in constraints.txt, below its marker, every indirect dependency of the development environment that runs this.

    .venv/bin/python scripts/lock.py           rewrite the block
    .venv/bin/python scripts/lock.py --check   exit with 1 where a package of the environment has no pin

The lines above the marker are kept by hand: direct dependencies, and packages whose
newest version left Python 3.10 behind. Needs Python 3.11.
"""

from __future__ import annotations

import re
import sys
from importlib.metadata import PackageNotFoundError, distribution
from pathlib import Path

import tomllib
from packaging.requirements import Requirement
from packaging.utils import canonicalize_name

ROOT = Path(__file__).resolve().parent.parent
FILE = ROOT / "constraints.txt"
MARKER = "# indirect dependencies, written by scripts/lock.py (their versions for Python 3.10 are not locked)"
# PyTorch's own libraries come with the index that the wheel is taken from.
LEFT_TO_TORCH = re.compile(r"nvidia-|cuda-|pytorch-triton")


def main() -> int:
    """Writes or checks the block."""
    above = FILE.read_text(encoding="utf-8").split(MARKER)[0]
    by_hand = {canonicalize_name(Requirement(line.split("#")[0]).name) for line in pins(above)}
    found = {name: version for name, version in closure().items() if name not in by_hand}
    if "--check" in sys.argv[1:]:
        pinned = {
            canonicalize_name(Requirement(line).name) for line in pins(FILE.read_text(encoding="utf-8"))
        }
        missing = sorted(closure().keys() - pinned)
        print(f"not pinned: {', '.join(missing)}" if missing else f"all {len(closure())} packages are pinned")
        return int(bool(missing))
    lines = [f'{name}=={version}; python_version >= "3.11"' for name, version in sorted(found.items())]
    FILE.write_text("\n".join([above.rstrip("\n"), "", MARKER, *lines, ""]), encoding="utf-8")
    print(f"{FILE.name}: {len(by_hand)} packages by hand, {len(lines)} indirect")
    return 0


def pins(text: str) -> list[str]:
    """Lines that pin a package."""
    return [line for line in text.splitlines() if line.strip() and not line.startswith("#")]


def closure() -> dict[str, str]:
    """Every package that `graphlora[dev]` needs in this environment, with the version that is installed."""
    project = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["project"]
    extras = project["optional-dependencies"]
    waiting = [*project["dependencies"], *(line for lines in extras.values() for line in lines)]
    found: dict[str, str] = {}
    seen: set[str] = set()
    while waiting:
        line = waiting.pop()
        requirement = Requirement(line)
        name = canonicalize_name(requirement.name)
        environments = [{"extra": extra} for extra in requirement.extras] + [{"extra": ""}]
        if line in seen or name == "graphlora" or not applies(requirement):
            continue
        seen.add(line)
        try:
            installed = distribution(name)
        except PackageNotFoundError:
            continue
        if not LEFT_TO_TORCH.match(name):
            found[name] = installed.version.split("+")[0]
        for part in installed.requires or []:
            needed = Requirement(part)
            if needed.marker is None or any(needed.marker.evaluate(values) for values in environments):
                needed.marker = None
                waiting.append(str(needed))
    return found


def applies(requirement: Requirement) -> bool:
    """Whether a requirement holds on this machine and Python."""
    return requirement.marker is None or requirement.marker.evaluate({"extra": ""})


if __name__ == "__main__":
    sys.exit(main())
