"""docs/safety.md names options, limits and exit codes that exist."""

import re
from dataclasses import fields
from pathlib import Path

from graphlora.errors import Interrupted
from graphlora.training.checkpoints import DAMAGED, SEAL_FILE
from graphlora.training.out_of_memory import SMALLEST_SHARE
from graphlora.training.recipe import Recipe

PAGE = (Path(__file__).parents[2] / "docs" / "safety.md").read_text(encoding="utf-8")


def test_options_and_defaults_are_those_of_the_recipe():
    options = {item.name: item.default for item in fields(Recipe)}
    rows = dict(re.findall(r"^\| `(\w+): (\w+)`(?: \(default\))? \|", PAGE, re.MULTILINE))
    assert set(rows) == {"on_nonfinite", "max_skipped_steps"}
    assert options["on_nonfinite"] == "stop"
    assert str(options["max_skipped_steps"]) == rows["max_skipped_steps"]
    assert "eval_limit" in options
    assert "save_total_limit" in options


def test_names_and_numbers_are_those_of_the_code():
    assert f"`{SEAL_FILE}`" in PAGE
    assert f"`{DAMAGED}checkpoint-N`" in PAGE
    assert f"at least {SMALLEST_SHARE:.0%} are listed" in PAGE
    codes = set(map(int, re.findall(r"^\| (\d+) \|", PAGE, re.MULTILINE)))
    assert codes == {0, 2, Interrupted("", 2).exit_code, Interrupted("", 15).exit_code}
