"""docs/methods.md covers every method, and what it names exists."""

import re
from pathlib import Path

import pytest

import graphlora.losses
from graphlora import GraphLoraConfig
from graphlora.tuner.config import config_field_names
from graphlora.tuner.presets import PRESETS

ROOT = Path(__file__).parents[2]
PAGE = (ROOT / "docs" / "methods.md").read_text(encoding="utf-8")
METHODS = [name for name in PRESETS if name not in ("graphlora", "paper", "released")]


@pytest.mark.parametrize("preset", METHODS)
def test_every_method_has_its_section_with_the_settings_of_its_preset(preset):
    (section,) = [part for part in PAGE.split("\n## ") if f'\n`preset="{preset}"`' in part]
    config = GraphLoraConfig(preset=preset)
    assert f"`preset: {preset}`" in PAGE
    settings = section[section.index("Settings:") :]
    for part in (f"r {config.r}", f"alpha {config.lora_alpha:g}"):
        assert re.search(rf"\b{part}\b", settings) or (preset == "mixlora" and "alpha 2 r" in settings), part
    if not config.num_experts_by_layer:
        assert re.search(rf"\bN {config.num_experts}\b", settings)


def test_what_the_page_names_exists():
    for path in re.findall(r"`(tests/[\w/.]+)`", PAGE):
        assert (ROOT / path).is_file(), path
    for name in re.findall(r"`graphlora\.losses\.(\w+)`", PAGE):
        assert hasattr(graphlora.losses, name)
    fields = re.findall(r"`((?:router|num_experts|edge|shared|attention|expert)_\w+)[=:`]", PAGE)
    assert fields
    assert set(fields) <= config_field_names() | {"edge_density", "graph_seed"}
