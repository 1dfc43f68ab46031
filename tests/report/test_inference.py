"""Statistics against numbers worked out by hand."""

import math
import random

import pytest

from graphlora.report.inference import (
    holm,
    paired_t_p,
    pooled_variance,
    sign_flip_p,
    summarize,
    variance,
    variance_ratio,
)


def test_summary_of_five_seeds():
    # Mean 3, squares 4 + 1 + 0 + 1 + 4 = 10, variance 2.5; half width 2.7764 sqrt(2.5 / 5).
    summary = summarize([1, 2, 3, 4, 5])
    assert (summary.n, summary.mean) == (5, 3)
    assert summary.std == pytest.approx(math.sqrt(2.5))
    assert summary.low == pytest.approx(3 - 2.776445 * math.sqrt(0.5), abs=1e-6)
    assert summary.high == pytest.approx(3 + 2.776445 * math.sqrt(0.5), abs=1e-6)


def test_one_seed_has_a_mean_and_nothing_else():
    summary = summarize([0.7])
    assert (summary.mean, summary.std, summary.low, summary.high) == (0.7, None, None, None)
    assert paired_t_p([0.7]) is None
    assert sign_flip_p([0.7]) is None


def test_paired_t_with_two_degrees_of_freedom():
    # Mean 2, variance 1, t = 2 / sqrt(1 / 3) = sqrt(12); p = 1 - sqrt(12 / 14).
    assert paired_t_p([1, 2, 3]) == pytest.approx(1 - math.sqrt(12 / 14))


def test_equal_differences_are_certain_or_nothing():
    assert paired_t_p([0.1, 0.1, 0.1]) is None
    assert paired_t_p([0.3 - 0.2, 0.9 - 0.8]) is None
    assert paired_t_p([0.0, 0.0]) == 1
    assert variance([0.1, 0.1, 0.1]) == 0


def test_sign_flips_counted_by_hand():
    # Sums of +-1 +-2 +-3: |sum| >= 6 for two of eight choices. Sums of +-1 +-2 +-4 are +-7, +-5, +-3 and +-1, none
    # of which is nearer to zero than 1 + 2 - 4.
    assert sign_flip_p([1, 2, 3]) == 2 / 8
    assert sign_flip_p([1, 2, -4]) == 1
    # As far as -1 + 2 + 4 are +-7 and +-5: four of eight.
    assert sign_flip_p([-1, 2, 4]) == 4 / 8
    assert sign_flip_p([0.3, 0.1, 0.4, 0.2, 0.6]) == 2 / 32


def test_sign_flips_with_zeros_and_rounding_count_ties_as_as_extreme():
    assert sign_flip_p([0.0, 0.0]) == 1
    assert sign_flip_p([0.1, 0.2, 0.30000000000000004]) == 2 / 8
    assert sign_flip_p([1.0] * 21) is None


def test_holm_multiplies_from_the_smallest_and_never_descends():
    # Sorted 0.005 x 4 = 0.02, 0.01 x 3 = 0.03, 0.03 x 2 = 0.06, 0.04 x 1 = 0.04 -> 0.06.
    assert holm([0.01, 0.04, None, 0.03, 0.005]) == pytest.approx([0.03, 0.06, None, 0.06, 0.02])
    assert holm([0.6, 0.9]) == [1.0, 1.0]
    assert holm([]) == []


def test_ratio_of_variances_with_five_seeds_each():
    # F(0.975; 4, 4) = 9.6045, so the interval is [R / 9.6045, 9.6045 R].
    ratio = variance_ratio(4.0, 4, 2.0, 4)
    assert ratio.ratio == 2
    assert ratio.low == pytest.approx(2 / 9.60453, rel=1e-5)
    assert ratio.high == pytest.approx(2 * 9.60453, rel=1e-5)


def test_ratio_of_variances_without_variance():
    assert variance_ratio(0.0, 4, 0.0, 4) is None
    assert variance_ratio(1.0, 0, 1.0, 4) is None
    assert variance_ratio(1.0, 4, 0.0, 4).ratio == math.inf
    zero = variance_ratio(0.0, 4, 1.0, 4)
    assert (zero.ratio, zero.low, zero.high) == (0, 0, 0)


def test_pooling_weighs_by_degrees_of_freedom():
    # Variances 2 (one degree) and 1 (two degrees): (2 + 2) / 3; a single value adds nothing.
    pooled, df = pooled_variance([[1, 3], [1, 2, 3], [9]])
    assert (pooled, df) == (pytest.approx(4 / 3), 3)


def test_intervals_cover_as_often_as_they_say():
    draw = random.Random(0)
    means = ratios = 0
    for _ in range(400):
        first, second = ([draw.gauss(0, 1) for _ in range(5)] for _ in range(2))
        summary, ratio = summarize(first), variance_ratio(variance(first), 4, variance(second), 4)
        means += summary.low <= 0 <= summary.high
        ratios += ratio.low <= 1 <= ratio.high
    # 95% of 400 is 380, with a standard deviation of 4.4.
    assert 362 <= means <= 396
    assert 362 <= ratios <= 396
