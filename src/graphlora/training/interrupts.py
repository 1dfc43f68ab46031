"""Ctrl-C and SIGTERM while a run is in work. Imports no torch: a signal may come while torch is loading."""

from __future__ import annotations

import os
import signal
import threading
from types import FrameType
from typing import Any

from graphlora.errors import Interrupted

SIGNALS = (signal.SIGINT, signal.SIGTERM)


class TrainingInterrupted(Interrupted):
    """Training ended on Ctrl-C or SIGTERM; the message says where it can go on and with which command."""


class Interrupts:
    """Takes over SIGINT and SIGTERM: outside of training they end the run at once, within it after the step.

    Attributes:
        number: The signal that came, or `None`.
        finishes_step: Whether a first signal waits for the end of the step; a second one never does.
    """

    def __init__(self) -> None:
        self.number: int | None = None
        self.finishes_step = False
        self._old: dict[int, Any] = {}

    @property
    def name(self) -> str | None:
        """`"SIGINT"` or `"SIGTERM"`; `None` where none came."""
        return None if self.number is None else signal.Signals(self.number).name

    def install(self) -> None:
        """Take over the signals; only the main thread can, elsewhere nothing changes."""
        if threading.current_thread() is threading.main_thread():
            for number in SIGNALS:
                self._old[number] = signal.signal(number, self._on_signal)

    def restore(self) -> None:
        """Give the signals back."""
        for number, handler in self._old.items():
            signal.signal(number, handler)
        self._old = {}

    def __enter__(self) -> Interrupts:
        """Install."""
        self.install()
        return self

    def __exit__(self, *_: object) -> None:
        """Restore."""
        self.restore()

    def _on_signal(self, number: int, frame: FrameType | None) -> None:
        at_once = self.number is not None or not self.finishes_step
        self.number = number
        if at_once:
            raise KeyboardInterrupt
        tell = f"\n{self.name}: stopping after this step with a checkpoint; a second signal stops at once\n"
        # Not through sys.stderr, which may be in the middle of a write.
        os.write(2, tell.encode())
