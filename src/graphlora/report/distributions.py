"""Student's t and Fisher's F distribution, from the regularized incomplete beta function. Needs no SciPy."""

from __future__ import annotations

import math
from collections.abc import Callable
from functools import cache

# The continued fraction gains digits fast; far more terms than double precision ever needs here.
TERMS = 10_000
PRECISION = 1e-15


def incomplete_beta(a: float, b: float, x: float) -> float:
    """Regularized incomplete beta function `I_x(a, b)`.

    Args:
        a: First shape, positive.
        b: Second shape, positive.
        x: Upper bound of the integral, 0 to 1.

    Returns:
        A probability, to about 1e-13.
    """
    assert min(a, b) > 0
    assert 0 <= x <= 1
    if x in (0.0, 1.0):
        return x
    if x > (a + 1) / (a + b + 2):  # the fraction converges fast on the other side
        return 1 - incomplete_beta(b, a, 1 - x)
    front = math.lgamma(a + b) - math.lgamma(a) - math.lgamma(b) + a * math.log(x) + b * math.log1p(-x)
    return math.exp(front) / a * _continued_fraction(a, b, x)


def t_two_sided(t: float, df: float) -> float:
    """Probability that |T| is at least |t|, for Student's T with `df` degrees of freedom."""
    return 0.0 if math.isinf(t) else incomplete_beta(df / 2, 0.5, df / (df + t * t))


@cache
def t_quantile(probability: float, df: float) -> float:
    """Value that Student's T stays below with the given probability (0.5 to 1, exclusive)."""
    assert 0.5 <= probability < 1
    return _invert(lambda t: 1 - t_two_sided(t, df) / 2, probability)


def f_below(value: float, df1: float, df2: float) -> float:
    """Probability that Fisher's F with `df1` and `df2` degrees of freedom is at most `value`."""
    if math.isinf(value):
        return 1.0
    return incomplete_beta(df1 / 2, df2 / 2, df1 * value / (df1 * value + df2))


@cache
def f_quantile(probability: float, df1: float, df2: float) -> float:
    """Value that Fisher's F stays below with the given probability (0 to 1, exclusive)."""
    assert 0 < probability < 1
    return _invert(lambda value: f_below(value, df1, df2), probability)


def _continued_fraction(a: float, b: float, x: float) -> float:
    """Lentz's method for the continued fraction of the incomplete beta function."""
    tiny = 1e-300
    c, d = 1.0, 1 / _away_from_zero(1 - (a + b) * x / (a + 1), tiny)
    value = d
    for m in range(1, TERMS):
        even = m * (b - m) * x / ((a + 2 * m - 1) * (a + 2 * m))
        odd = -(a + m) * (a + b + m) * x / ((a + 2 * m) * (a + 2 * m + 1))
        for term in (even, odd):
            d = 1 / _away_from_zero(1 + term * d, tiny)
            c = _away_from_zero(1 + term / c, tiny)
            value *= d * c
        if abs(d * c - 1) < PRECISION:
            break
    return value


def _away_from_zero(value: float, tiny: float) -> float:
    return value if abs(value) > tiny else tiny


def _invert(below: Callable[[float], float], probability: float) -> float:
    """Bisection on [0, infinity) to the last bit of double precision."""
    low, high = 0.0, 1.0
    while below(high) < probability:
        low, high = high, 2 * high
    for _ in range(200):
        middle = (low + high) / 2
        if middle in (low, high):
            break
        low, high = (middle, high) if below(middle) < probability else (low, middle)
    return (low + high) / 2
