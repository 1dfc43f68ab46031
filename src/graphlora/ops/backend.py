"""The one switch between compute paths."""

from __future__ import annotations

from typing import Literal

from graphlora.errors import GraphLoraError

Backend = Literal["auto", "eager", "torch", "triton"]
BACKENDS: tuple[str, ...] = ("auto", "eager", "torch", "triton")


def resolve_backend(backend: str) -> str:
    """The path that runs for a configured `backend`.

    `"eager"` loops over the experts and reads like the paper; `"torch"` shares the frozen projections between the
    experts and recomputes what is cheap; `"auto"` picks the fastest one that is there.

    Raises:
        GraphLoraError: for an unknown name, or for `"triton"`, whose kernels are not part of this release.
    """
    if backend not in BACKENDS:
        raise GraphLoraError(f"backend={backend!r} is unknown; choose one of {', '.join(BACKENDS)}.")
    if backend == "triton":
        raise GraphLoraError(
            "backend='triton': this release has no Triton kernels yet; use backend='auto' (the fused PyTorch path)."
        )
    return "torch" if backend == "auto" else backend
