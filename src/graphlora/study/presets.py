"""The presets' values without importing their package, which imports PEFT and torch: planning takes no seconds."""

from __future__ import annotations

import runpy
from functools import cache
from pathlib import Path
from typing import Any

from graphlora.errors import GraphLoraError
from graphlora.training.suggestion import suggestion

DEFAULT = "graphlora"


def preset_values(name: str | None) -> dict[str, Any]:
    """Fields that a preset sets; `None` is the default preset.

    Raises:
        GraphLoraError: No such preset.
    """
    presets = _presets()
    name = DEFAULT if name is None else name
    if name not in presets:
        raise GraphLoraError(
            f"preset {name!r} is unknown{suggestion(name, set(presets))}; choose one of {', '.join(presets)}"
        )
    return dict(presets[name])


@cache
def _presets() -> dict[str, dict[str, Any]]:
    path = Path(__file__).parents[1] / "tuner" / "presets.py"
    return runpy.run_path(str(path))["PRESETS"]
