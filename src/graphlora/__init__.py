"""GraphLoRA: fine-tuning language models with LoRA experts that collaborate over a graph (arXiv 2412.16216).

Importing the package registers the method with PEFT:

    from graphlora import GraphLoraConfig
    model = peft.get_peft_model(model, GraphLoraConfig(task_type="CAUSAL_LM"))
"""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

from graphlora.autoregister import register_with_peft

if TYPE_CHECKING:
    from graphlora.tuner.compiled_layers import compile_layers
    from graphlora.tuner.config import GraphLoraConfig
    from graphlora.tuner.model import GraphLoraModel

__version__ = "0.1.0"
__all__ = ["GraphLoraConfig", "GraphLoraModel", "__version__", "compile_layers"]

_HOMES = {
    "GraphLoraConfig": "graphlora.tuner.config",
    "GraphLoraModel": "graphlora.tuner.model",
    "compile_layers": "graphlora.tuner.compiled_layers",
}

register_with_peft()


def __getattr__(name: str) -> Any:
    """Loads PEFT and torch when a public name is first used, so that the command line starts fast."""
    if name not in _HOMES:
        raise AttributeError(f"module 'graphlora' has no attribute {name!r}")
    return getattr(importlib.import_module(_HOMES[name]), name)
