"""docs/training.md names options, values and limits that exist."""

import re
from pathlib import Path
from typing import get_args

from graphlora.training.captured import MAX_GRAPHS
from graphlora.training.recipe import option_types
from graphlora.training.step_mode import MASKED_ATTENTION

PAGE = (Path(__file__).parents[2] / "docs" / "training.md").read_text(encoding="utf-8")


def test_options_exist():
    named = set(re.findall(r"--(\w+)", PAGE)) - {"help"}
    assert {"step_mode", "loss_kernel", "packing", "load_in_4bit", "recompute_gate_up"} <= named
    assert named <= set(option_types())


def test_every_step_mode_has_its_row():
    table = PAGE.split("## `step_mode`")[1].split("## ")[0]
    assert set(re.findall(r"^\| `(\w+)` \|", table, re.MULTILINE)) == set(
        get_args(option_types()["step_mode"])
    )


def test_limits_are_those_of_the_code():
    assert f"At most {MAX_GRAPHS} shapes" in PAGE
    assert "other than `sdpa` and `eager`" in PAGE
    assert set(MASKED_ATTENTION) == {"sdpa", "eager"}
