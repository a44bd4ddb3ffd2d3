"""Intervals against tables."""

import numpy as np
import pytest
from scipy import stats

from sarm_jax.reporting.statistics import mean_interval, stratified_interval, wilson_interval


def test_student_interval_by_the_table():
    found = mean_interval([1.0, 2.0, 3.0, 4.0, 5.0])
    half = 2.776445 * np.sqrt(2.5 / 5)  # t of 4 degrees of freedom at 97.5 %
    assert found == pytest.approx({"mean": 3.0, "low": 3 - half, "high": 3 + half}, rel=1e-6)


def test_one_value_has_no_interval():
    assert mean_interval([2.0]) == {"mean": 2.0, "low": None, "high": None}


def test_wilson_interval_of_nine_in_ten():
    np.testing.assert_allclose(wilson_interval(0.9, 10), (0.59585, 0.98212), atol=5.1e-6)


def test_a_stratified_interval_is_welchs():
    rng = np.random.default_rng(0)
    x, y = rng.normal(1, 1, 9), rng.normal(4, 5, 14)
    one = stratified_interval([x], [1.0])
    assert one == pytest.approx(mean_interval(x))
    found = stratified_interval([x, y], [0.5, 0.5])
    welch = stats.ttest_ind(x, -y, equal_var=False).confidence_interval()  # of mean x + mean y
    assert found["mean"] == pytest.approx((x.mean() + y.mean()) / 2)
    assert (found["low"], found["high"]) == pytest.approx((welch.low / 2, welch.high / 2))
    assert stratified_interval([x, [3.0]], [0.5, 0.5])["low"] is None
    same = stratified_interval([[2.0, 2.0], [4.0, 4.0]], [0.25, 0.75])
    assert same == {"mean": 3.5, "low": 3.5, "high": 3.5}
