"""Intervals and p-values against printed tables, hand numbers and, where it is installed, scipy."""

from __future__ import annotations

import math

import numpy as np
import pytest

from phi2.lab.statistics import holm, mean_interval, paired_interval, paired_p, t_inside, t_quantile

TABLE = {1: 12.706, 2: 4.303, 3: 3.182, 4: 2.776, 5: 2.571, 9: 2.262, 30: 2.042, 120: 1.980}  # of any textbook


@pytest.mark.parametrize("df", TABLE)
def test_students_quantile_is_that_of_the_tables(df):
    assert t_quantile(df) == pytest.approx(TABLE[df], abs=5e-4)


@pytest.mark.parametrize("df", range(1, 13))
def test_students_distribution_is_that_of_scipy(df):
    stats = pytest.importorskip("scipy.stats")
    for t in (0.0, 0.1, 1.0, 2.5, 40.0):
        assert t_inside(t, df) == pytest.approx(1 - 2 * stats.t.sf(t, df), abs=1e-12)


def test_the_interval_of_a_mean_is_students():
    found = mean_interval(np.array([1.0, 2.0, 3.0]))  # s = 1, s / sqrt(3) = 0.57735, t = 4.30265
    assert found == pytest.approx((2.0, 2 - 2.48414, 2 + 2.48414), abs=1e-5)


def test_one_value_has_no_interval_and_one_pair_no_p_value():
    one = np.array([3.0])
    assert mean_interval(one).mean == 3 and math.isnan(mean_interval(one).low)
    assert paired_interval(one, one - 1).mean == 1 and math.isnan(paired_interval(one, one - 1).high)
    assert math.isnan(paired_p(one, one - 1))


def test_what_seeds_have_in_common_cancels_in_a_paired_difference():
    base = np.array([0.0, 10.0, -20.0, 5.0])
    better = base + np.array([0.9, 1.0, 1.1, 1.0])
    mean, low, high = paired_interval(better, base)
    assert mean == pytest.approx(1.0) and 0.8 < low < 1 < high < 1.2
    assert paired_p(better, base) < 1e-3


def test_the_interval_of_a_difference_leaves_out_0_where_the_p_value_is_below_a_twentieth():
    rng = np.random.default_rng(0)
    for values in rng.normal(0.7, 1, size=(50, 5)):
        _, low, high = paired_interval(values, np.zeros(5))
        assert (low <= 0 <= high) == (paired_p(values, np.zeros(5)) >= 0.05)


def test_the_paired_p_value_is_that_of_a_hand_calculation():
    """Differences 1, 2, 3: t = 2 / 0.57735 = 3.4641; for two degrees of freedom p = 1 - t / sqrt(t^2 + 2)."""
    expected = 1 - math.sqrt(12 / 14)
    assert paired_p(np.array([1.0, 2.0, 3.0]), np.zeros(3)) == pytest.approx(expected, abs=1e-12)


def test_differences_without_spread_have_no_p_value():
    ones = np.ones(3)
    assert paired_p(ones, ones) == 1 and math.isnan(paired_p(ones, ones - 1))


def test_holm_multiplies_the_smallest_most_and_keeps_the_order():
    assert holm([0.01, 0.04, 0.03]) == pytest.approx([0.03, 0.06, 0.06])
    assert holm([0.5, 0.9]) == [1.0, 1.0]


def test_holm_leaves_out_what_has_no_p_value():
    first, second = holm([math.nan, 0.04])
    assert math.isnan(first) and second == pytest.approx(0.04)


def test_values_that_are_all_one_have_no_spread():
    assert np.full(3, 0.78).std() > 0  # their mean is rounded
    assert mean_interval(np.full(3, 0.78)).half == 0
