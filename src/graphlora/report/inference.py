"""What seeds allow to say: intervals, paired tests, a correction for many tests, and ratios of variances."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import product

from graphlora.report.distributions import f_quantile, t_quantile, t_two_sided

LEVEL = 0.95
# Beyond this many seeds the exact sign-flip test would look at more than a million arrangements.
MOST_FLIPS = 20
# Spread of differences, relative to their mean, that is the rounding of decimal numbers and no variance.
_ROUNDING = 1e-9


@dataclass(frozen=True)
class Summary:
    """Mean of one quantity over seeds.

    Attributes:
        n: Number of seeds.
        mean: Mean.
        std: Standard deviation over seeds (n - 1 in the denominator); `None` for one seed.
        low: Lower end of the 95% t interval of the mean; `None` for one seed.
        high: Its upper end.
    """

    n: int
    mean: float
    std: float | None
    low: float | None
    high: float | None


@dataclass(frozen=True)
class VarianceRatio:
    """Variance over seeds relative to another one's, with its 95% F interval.

    Attributes:
        ratio: First variance over the second; infinite where only the second is zero.
        low: Lower end of the interval.
        high: Its upper end.
    """

    ratio: float
    low: float
    high: float


def mean(values: Sequence[float]) -> float:
    """Mean of at least one value."""
    return math.fsum(values) / len(values)


def variance(values: Sequence[float]) -> float:
    """Variance with n - 1 in the denominator, of at least two values."""
    center = mean(values)
    squares = math.fsum((value - center) ** 2 for value in values)
    # Equal values leave a rounding error of their mean behind, which is not a variance.
    return 0.0 if min(values) == max(values) else squares / (len(values) - 1)


def summarize(values: Sequence[float], level: float = LEVEL) -> Summary:
    """Mean, standard deviation and t interval: `mean +- t(n - 1) std / sqrt(n)`.

    Args:
        values: One value per seed, at least one.
        level: Coverage of the interval.
    """
    n, center = len(values), mean(values)
    if n < 2:
        return Summary(n, center, None, None, None)
    std = math.sqrt(variance(values))
    half = t_quantile((1 + level) / 2, n - 1) * std / math.sqrt(n)
    return Summary(n, center, std, center - half, center + half)


def paired_t_p(differences: Sequence[float]) -> float | None:
    """Two-sided p value of the paired t test that the differences have mean zero.

    `None` for one seed, and where all differences are the same up to rounding: scores are shares of some hundred items,
    so equal differences are a coincidence of two or three seeds, not certainty.
    """
    if len(differences) < 2:
        return None
    center, spread = mean(differences), variance(differences)
    if math.sqrt(spread) <= _ROUNDING * abs(center):
        return None if center else 1.0
    return t_two_sided(center / math.sqrt(spread / len(differences)), len(differences) - 1)


def sign_flip_p(differences: Sequence[float]) -> float | None:
    """Two-sided p value of the exact sign-flip permutation test; `None` for one seed or over 20.

    The share of all 2^n choices of signs whose mean is at least as far from zero as the observed one. It assumes
    symmetry but no normal distribution, and is never below 2 / 2^n: 0.0625 for five seeds.
    """
    n = len(differences)
    if not 2 <= n <= MOST_FLIPS:
        return None
    observed = abs(math.fsum(differences))
    slack = 1e-12 * math.fsum(map(abs, differences))
    sizes = [abs(value) for value in differences]
    # A choice of signs and its opposite count alike, so the first sign is held.
    sums = (
        sizes[0] + math.fsum(s * v for s, v in zip(signs, sizes[1:], strict=True))
        for signs in product((1, -1), repeat=n - 1)
    )
    return sum(abs(total) >= observed - slack for total in sums) / 2 ** (n - 1)


def holm(p_values: Sequence[float | None]) -> list[float | None]:
    """Holm's step-down correction: p values that hold for all tests together.

    Args:
        p_values: One per test; `None` where there was none, which counts for nothing.

    Returns:
        Adjusted p values in the same order.
    """
    order = sorted((p, index) for index, p in enumerate(p_values) if p is not None)
    adjusted: list[float | None] = [None] * len(p_values)
    highest = 0.0
    for rank, (p, index) in enumerate(order):
        highest = max(highest, min(1.0, p * (len(order) - rank)))
        adjusted[index] = highest
    return adjusted


def variance_ratio(
    first: float, first_df: int, second: float, second_df: int, level: float = LEVEL
) -> VarianceRatio | None:
    """Ratio of two variances with its F interval, `[R / F(1 - a/2; d1, d2), R F(1 - a/2; d2, d1)]`.

    Args:
        first: Variance over seeds.
        first_df: Its degrees of freedom, n - 1 (summed where variances are pooled).
        second: The variance to compare with.
        second_df: Its degrees of freedom.
        level: Coverage of the interval, for independent normal values.

    Returns:
        `None` where a variance has no degrees of freedom or both are zero.
    """
    if first_df < 1 or second_df < 1 or first == second == 0:
        return None
    if second == 0:
        return VarianceRatio(math.inf, 0.0, math.inf)
    ratio, tail = first / second, (1 + level) / 2
    return VarianceRatio(
        ratio, ratio / f_quantile(tail, first_df, second_df), ratio * f_quantile(tail, second_df, first_df)
    )


def pooled_variance(groups: Sequence[Sequence[float]]) -> tuple[float, int]:
    """Variance within groups and its degrees of freedom; groups of one value add nothing."""
    known = [(variance(values), len(values) - 1) for values in groups if len(values) > 1]
    df = sum(d for _, d in known)
    return (math.fsum(v * d for v, d in known) / df if df else 0.0), df
