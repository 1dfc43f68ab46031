"""Errors that cost a candidate or a case, not the whole run."""

from __future__ import annotations

import subprocess


class NotHere(RuntimeError):
    """What is asked for cannot be measured on this machine."""


def failures() -> tuple[type[Exception], ...]:
    """Error types that a broken candidate raises: of Python, PyTorch (all are RuntimeErrors) and Triton."""
    known: tuple[type[Exception], ...] = (
        ArithmeticError,
        AssertionError,
        AttributeError,
        ImportError,
        LookupError,
        OSError,
        RuntimeError,
        TypeError,
        ValueError,
        subprocess.SubprocessError,
    )
    try:
        from triton.errors import TritonError
    except ImportError:
        return known
    return (*known, TritonError)


def breaks_the_device(error: BaseException) -> bool:
    """Whether no later work on the GPU can succeed in this process."""
    text = str(error)
    return any(
        mark in text
        for mark in (
            "illegal memory access",
            "device-side assert",
            "unspecified launch failure",
            "misaligned address",
        )
    )
