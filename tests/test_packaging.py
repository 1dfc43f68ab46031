"""What is declared is what is used, tested and explained: dependencies, their bounds, the versions that are locked."""

import ast
import re
import sys
from importlib.metadata import packages_distributions
from pathlib import Path

import pytest
from packaging.requirements import Requirement
from packaging.utils import canonicalize_name
from packaging.version import Version

ROOT = Path(__file__).parents[1]
# What a declared package brings in every supported version, used as that package uses it.
BROUGHT = {"numpy", "pyarrow", "packaging", "huggingface-hub", "tokenizers"}


@pytest.fixture(scope="module")
def project() -> dict:
    tomllib = pytest.importorskip("tomllib", reason="Python 3.10 has no TOML reader")
    return tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]


def pins(path: Path) -> dict[str, Version]:
    lines = [line.split(";")[0] for line in path.read_text().splitlines() if line.strip() and line[0] != "#"]
    found: dict[str, Version] = {}
    for line in lines:
        requirement = Requirement(line)
        found.setdefault(canonicalize_name(requirement.name), Version(str(requirement.specifier)[2:]))
    return found


def test_every_lower_bound_is_the_version_that_is_tested_as_the_oldest(project):
    oldest = pins(ROOT / ".ci" / "oldest.txt")
    for requirement in map(Requirement, project["dependencies"]):
        (bound,) = requirement.specifier
        assert bound.operator == ">="
        assert oldest.pop(canonicalize_name(requirement.name)) == Version(bound.version), requirement
    assert not oldest


def test_the_locked_versions_are_supported_ones(project):
    locked = pins(ROOT / "constraints.txt")
    for requirement in map(Requirement, project["dependencies"]):
        assert locked[canonicalize_name(requirement.name)] in requirement.specifier, requirement


def test_every_package_of_the_environment_is_locked(project):
    import runpy

    lock = runpy.run_path(str(ROOT / "scripts" / "lock.py"))
    missing = lock["closure"]().keys() - pins(ROOT / "constraints.txt").keys()
    assert not missing, "run scripts/lock.py"


def imported() -> dict[str, set[str]]:
    """Top-level packages that the source imports, and the files that do."""
    found: dict[str, set[str]] = {}
    for path in (ROOT / "src").rglob("*.py"):
        for node in ast.walk(ast.parse(path.read_text())):
            if isinstance(node, ast.Import):
                names = [alias.name for alias in node.names]
            elif isinstance(node, ast.ImportFrom) and node.level == 0:
                names = [node.module or ""]
            else:
                continue
            for name in names:
                found.setdefault(name.split(".")[0], set()).add(path.name)
    return {
        name: files for name, files in found.items() if name not in {*sys.stdlib_module_names, "graphlora"}
    }


def test_every_import_is_declared_and_every_declared_package_is_used(project):
    distributions = packages_distributions()
    declared = {canonicalize_name(Requirement(line).name) for line in project["dependencies"]}
    extras = project["optional-dependencies"]
    optional = {
        canonicalize_name(Requirement(line).name)
        for name, lines in extras.items()
        if name not in ("dev", "test")
        for line in lines
    } | {"triton"}
    used = set()
    for name, files in imported().items():
        found = {canonicalize_name(part) for part in distributions.get(name, [name])}
        assert found & (declared | optional | BROUGHT), f"{name}, imported in {files}, is not declared"
        used |= found
    assert declared <= used, "a dependency that nothing imports"


def test_every_dependency_has_its_reason(project):
    page = (ROOT / "docs" / "dependencies.md").read_text()
    rows = re.findall(r"^\| (?:`\w+` \| )?([\w, .()>=-]+?) \|", page, re.MULTILINE)
    explained = {canonicalize_name(name.split(" (")[0].strip()) for row in rows for name in row.split(",")}
    lines = [
        *project["dependencies"],
        *(line for lines in project["optional-dependencies"].values() for line in lines),
    ]
    needed = {canonicalize_name(Requirement(line).name) for line in lines} - {"graphlora"}
    assert needed <= explained


def test_the_versions_page_holds_the_bounds(project):
    page = (ROOT / "docs" / "compatibility.md").read_text()
    bounds = {
        Requirement(line).name: next(iter(Requirement(line).specifier)).version
        for line in project["dependencies"]
    }
    rows = dict(
        re.findall(r"^\| (torch|transformers|peft|accelerate|datasets) \| ([\d.]+) \|", page, re.MULTILINE)
    )
    assert len(rows) == 5
    for name, version in rows.items():
        assert Version(version) == Version(bounds[name]), name
