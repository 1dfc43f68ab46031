"""Registers the method with PEFT as soon as both are imported, in either order, without importing PEFT by itself.

`import graphlora` must make `AutoPeftModel.from_pretrained` understand a GraphLoRA adapter, and must also be cheap
enough for `graphlora --help`. So registration runs at once where PEFT is already loaded, and otherwise right after PEFT
has been imported.
"""

from __future__ import annotations

import importlib.abc
import importlib.util
import sys
from collections.abc import Sequence
from importlib.machinery import ModuleSpec
from types import ModuleType


def register_with_peft() -> None:
    """Registers now or after the first import of PEFT."""
    if "peft" in sys.modules:
        _register()
    elif not any(isinstance(finder, _AfterPeft) for finder in sys.meta_path):
        sys.meta_path.insert(0, _AfterPeft())


def _register() -> None:
    from graphlora.tuner.register import register

    register()


class _AfterPeft(importlib.abc.MetaPathFinder):
    """Finds PEFT with the other finders, and registers when its import is complete; then steps aside.

    Being asked where PEFT is (`importlib.util.find_spec`) does not count as an import.
    """

    def __init__(self) -> None:
        self.searching = False

    def find_spec(
        self, fullname: str, path: Sequence[str] | None = None, target: ModuleType | None = None
    ) -> ModuleSpec | None:
        """See `importlib.abc.MetaPathFinder`."""
        if fullname != "peft" or self.searching:
            return None
        self.searching = True
        try:
            spec = importlib.util.find_spec(fullname)
        finally:
            self.searching = False
        if spec is not None and spec.loader is not None:
            load = spec.loader.exec_module

            def load_and_register(module: ModuleType) -> None:
                load(module)
                if self in sys.meta_path:
                    sys.meta_path.remove(self)
                _register()

            # Python's import machinery looks the method up on the object.
            setattr(spec.loader, "exec_module", load_and_register)  # noqa: B010 - an assignment is an error to type checkers
        return spec
