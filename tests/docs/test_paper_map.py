"""docs/paper_map.md names symbols and tests that exist."""

import importlib
import re
from functools import reduce
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
PAGE = (ROOT / "docs" / "paper_map.md").read_text(encoding="utf-8")
ROWS = [line for line in PAGE.splitlines() if line[:2] == "| "]
CELLS = [[cell.strip() for cell in row.strip("|").split("|")] for row in ROWS[1:]]


def resolve(symbol: str) -> object:
    """`graphlora.router.GraphRouter` or `graphlora.tuner.model.GraphLoraModel.forward` as an object."""
    parts = symbol.split(".")
    cut = next((i for i, part in enumerate(parts) if part[0].isupper() or part.isupper()), len(parts) - 1)
    return reduce(getattr, parts[cut:], importlib.import_module(".".join(parts[:cut])))


@pytest.mark.parametrize("cells", CELLS, ids=lambda cells: f"{cells[0]}: {cells[1]}")
def test_symbols_and_tests_exist(cells):
    module = ""
    for symbol in re.findall(r"`([\w.]+)`", cells[2]):
        if symbol.startswith("graphlora."):
            module = symbol.rpartition(".")[0]
        else:
            symbol = f"{module}.{symbol}"
        assert resolve(symbol) is not None
    paths = re.findall(r"`(tests/[\w./]+)`", cells[3])
    assert paths
    for path in paths:
        assert (ROOT / path).exists(), path
