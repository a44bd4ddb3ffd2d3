"""Intervals against tables and SciPy, wins, and the text of an interval."""

import numpy as np
import pytest
from scipy import stats

from sarm_jax.reporting.statistics import (
    count_wins,
    format_interval,
    holm,
    mean_interval,
    stratified_interval,
    wilson_interval,
)


def test_student_interval_by_the_table():
    interval = mean_interval([1.0, 2.0, 3.0, 4.0, 5.0])
    half = 2.776445 * np.sqrt(2.5 / 5)  # t of 4 degrees of freedom at 97.5 %
    assert interval == pytest.approx({"mean": 3.0, "low": 3 - half, "high": 3 + half}, rel=1e-6)


def test_one_value_has_no_interval():
    assert mean_interval([2.0]) == {"mean": 2.0, "low": None, "high": None}


def test_wilson_interval_of_nine_in_ten():
    np.testing.assert_allclose(wilson_interval(0.9, 10), (0.59585, 0.98212), atol=5.1e-6)


def test_a_stratified_interval_is_welchs():
    rng = np.random.default_rng(0)
    x, y = rng.normal(1, 1, 9), rng.normal(4, 5, 14)
    one = stratified_interval([x], [1.0])
    assert one == pytest.approx(mean_interval(x))
    interval = stratified_interval([x, y], [0.5, 0.5])
    welch = stats.ttest_ind(x, -y, equal_var=False).confidence_interval()  # of mean(x) + mean(y)
    assert interval["mean"] == pytest.approx((x.mean() + y.mean()) / 2)
    ends = interval["low"], interval["high"]
    assert ends == pytest.approx((welch.low / 2, welch.high / 2))
    assert stratified_interval([x, [3.0]], [0.5, 0.5])["low"] is None
    same = stratified_interval([[2.0, 2.0], [4.0, 4.0]], [0.25, 0.75])
    assert same == {"mean": 3.5, "low": 3.5, "high": 3.5}


def test_margins_of_zero_are_half_a_win():
    assert count_wins([2, 0, -3]).tolist() == [1.0, 0.5, 0.0]


def test_text_of_an_interval():
    interval = mean_interval([0.25, 0.75])
    assert format_interval(interval) == "0.50 (95 % -2.68 to 3.68)"
    assert format_interval(interval, "+.4f") == "+0.5000 (95 % -2.6766 to +3.6766)"
    assert format_interval({"mean": 0.5, "low": None, "high": None}, ".3f") == "0.500"


def test_holm_by_hand():
    np.testing.assert_allclose(holm([0.01, 0.04, 0.03, 0.005]), [0.03, 0.06, 0.06, 0.02])
    assert holm([0.9, 0.8]) == [1.0, 1.0]
