"""docs/configuration.md says what the code does: every field, every preset value."""

import re
from dataclasses import MISSING, fields
from pathlib import Path

import pytest
from peft.config import PeftConfig

from graphlora.tuner.config import GraphLoraConfig
from graphlora.tuner.presets import PRESETS

PAGE = (Path(__file__).parents[2] / "docs" / "configuration.md").read_text(encoding="utf-8")
FIELD_TABLES, _, TABLES = PAGE.partition("## What the presets set")
PRESET_TABLE, _, METHOD_TABLES = TABLES.partition("## What the methods set")
GRAPHLORA = ["graphlora", "paper", "released"]
METHODS = [name for name in PRESETS if name not in GRAPHLORA]
OURS = {item.name: item for item in fields(GraphLoraConfig)}
for inherited in fields(PeftConfig):
    OURS.pop(inherited.name, None)


def rows(text: str) -> list[list[str]]:
    return [
        [cell.strip() for cell in line.strip("|").split("|")]
        for line in text.splitlines()
        if line[:3] == "| `"
    ]


def documented() -> dict[str, str]:
    return {name: row[1] for row in rows(FIELD_TABLES) for name in re.findall(r"`(\w+)`", row[0])}


def test_every_field_has_its_row_and_no_row_is_stale():
    assert set(documented()) == set(OURS)


def test_defaults_are_those_of_the_code():
    for name, shown in documented().items():
        if name in PRESETS["graphlora"]:
            assert shown == "*preset*", name
            continue
        default = OURS[name].default
        value = OURS[name].default_factory() if default is MISSING else default
        assert shown.strip("`") == (
            f'"{value}"' if isinstance(value, str) else f"{value:g}" if name == "lora_alpha" else str(value)
        )


@pytest.mark.parametrize("preset", GRAPHLORA)
def test_the_preset_table_is_that_of_the_code(preset):
    column = 1 + GRAPHLORA.index(preset)
    shown = {row[0].strip("`"): row[column] for row in rows(PRESET_TABLE)}
    assert shown == {name: str(value) for name, value in PRESETS[preset].items()}


@pytest.mark.parametrize("preset", METHODS)
def test_the_method_tables_say_what_differs_from_the_default_preset(preset):
    own, common = METHOD_TABLES.split("All of them set")
    assert re.findall(r"`(\w+)`", own[own.index("| field") : own.index("|---")]) == METHODS
    shown = {row[0].strip("`"): row[1 + METHODS.index(preset)] for row in rows(own)}
    shown |= {row[0].strip("`"): row[1] for row in rows(common)}
    values = PRESETS[preset]
    assert shown == {name: str(values[name]) for name in shown}
    assert {name for name in values if values[name] != PRESETS["graphlora"][name]} <= set(shown)
