"""Quantiles and probabilities against closed forms and printed tables."""

import math

import pytest

from graphlora.report.distributions import f_below, f_quantile, incomplete_beta, t_quantile, t_two_sided


def test_beta_has_its_closed_forms():
    # I_x(1, 1) = x; I_x(2, 1) = x^2; I_x(1, 3) = 1 - (1 - x)^3; I_1/2(a, a) = 1/2.
    for x in (0.0, 0.1, 0.5, 0.93, 1.0):
        assert incomplete_beta(1, 1, x) == pytest.approx(x, abs=1e-13)
        assert incomplete_beta(2, 1, x) == pytest.approx(x * x, abs=1e-13)
        assert incomplete_beta(1, 3, x) == pytest.approx(1 - (1 - x) ** 3, abs=1e-13)
    assert incomplete_beta(37.5, 37.5, 0.5) == pytest.approx(0.5, abs=1e-12)


def test_t_with_one_and_two_degrees_of_freedom_has_closed_forms():
    # One degree is Cauchy: P(|T| >= t) = 1 - 2 atan(t) / pi; two: 1 - t / sqrt(2 + t^2).
    for t in (0.1, 1.0, 12.7, 400.0):
        assert t_two_sided(t, 1) == pytest.approx(1 - 2 * math.atan(t) / math.pi, rel=1e-9)
        assert t_two_sided(t, 2) == pytest.approx(1 - t / math.sqrt(2 + t * t), rel=1e-9)
    assert t_two_sided(math.inf, 4) == 0


@pytest.mark.parametrize(
    ("df", "printed"), [(1, 12.7062), (2, 4.3027), (4, 2.7764), (9, 2.2622), (30, 2.0423), (1000, 1.9623)]
)
def test_t_quantiles_are_those_of_the_printed_table(df, printed):
    assert t_quantile(0.975, df) == pytest.approx(printed, abs=5e-5)


@pytest.mark.parametrize(
    ("probability", "df1", "df2", "printed"),
    [(0.975, 4, 4, 9.6045), (0.95, 2, 10, 4.1028), (0.95, 5, 1, 230.1619), (0.975, 12, 12, 3.2773)],
)
def test_f_quantiles_are_those_of_the_printed_table(probability, df1, df2, printed):
    assert f_quantile(probability, df1, df2) == pytest.approx(printed, abs=1e-4)


def test_f_is_the_square_of_t_and_its_own_inverse():
    t = t_quantile(0.975, 7)
    assert f_quantile(0.95, 1, 7) == pytest.approx(t * t, rel=1e-10)
    assert f_quantile(0.025, 4, 9) == pytest.approx(1 / f_quantile(0.975, 9, 4), rel=1e-10)
    assert f_below(math.inf, 3, 3) == 1
