"""`packing` on a CPU."""

from __future__ import annotations

from benchmarks.suites.packing import measure

__all__ = ["measure"]
