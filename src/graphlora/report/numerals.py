"""Numbers as the tables and pictures write them."""

from __future__ import annotations

import math
from collections.abc import Mapping

from graphlora.report.inference import Summary, VarianceRatio
from graphlora.report.names import variant_label

NONE = "–"


def mean_std(summary: Summary) -> str:
    """`66.80 ± 0.41`; the mean alone for one seed."""
    return f"{summary.mean:.2f}" + ("" if summary.std is None else f" ± {summary.std:.2f}")


def number(value: float | None, digits: int = 2) -> str:
    """A number, or a dash where there is none."""
    return NONE if value is None else f"{value:.{digits}f}"


def signed(value: float, digits: int = 2) -> str:
    """A difference with its sign."""
    text = f"{value:+.{digits}f}"
    return text[1:] if float(text) == 0 else text.replace("-", "−")


def extremes(values: Mapping[str, float], digits: int = 1, signs: bool = False) -> str:
    """`from 60.4 (LoRA) to 61.9 (MixLoRA)`: the lowest and the highest of the values of variants."""

    def shown(variant: str) -> str:
        text = signed(values[variant], digits) if signs else f"{values[variant]:.{digits}f}"
        return f"{text} ({variant_label(variant)})"

    ordered = sorted(values, key=lambda variant: values[variant])
    return f"from {shown(ordered[0])} to {shown(ordered[-1])}"


def millions(value: float | None) -> str:
    """A count in millions: two places, or more for small models."""
    return NONE if value is None else f"{value / 1e6:.2f}" if value >= 1e5 else f"{value / 1e6:.4f}"


def interval(summary: Summary, signs: bool = False) -> str:
    """`65.20 to 68.40`."""
    if summary.low is None or summary.high is None:
        return NONE
    low, high = (signed(end) if signs else f"{end:.2f}" for end in (summary.low, summary.high))
    return f"{low} to {high}"


def p_text(p: float | None, digits: int = 3) -> str:
    """A p value, to three places if not said otherwise."""
    return NONE if p is None else "<0.001" if p < 0.001 else f"{p:.{digits}f}"


def ratio_text(ratio: VarianceRatio | None) -> str:
    """`1.83 [0.19, 17.6]`."""
    if ratio is None:
        return NONE
    return "{} [{}, {}]".format(*map(_three_digits, (ratio.ratio, ratio.low, ratio.high)))


def _three_digits(value: float) -> str:
    if math.isinf(value):
        return "∞"
    return f"{value:.2f}" if value < 10 else f"{value:.1f}" if value < 100 else f"{value:,.0f}"
