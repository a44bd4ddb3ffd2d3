"""Intervals against tables."""

import numpy as np
import pytest

from sarm_jax.statistics import mean_interval, wilson_interval


def test_student_interval_by_the_table():
    found = mean_interval([1.0, 2.0, 3.0, 4.0, 5.0])
    half = 2.776445 * np.sqrt(2.5 / 5)  # t of 4 degrees of freedom at 97.5 %
    assert found == pytest.approx({"mean": 3.0, "low": 3 - half, "high": 3 + half}, abs=1e-5)


def test_one_value_has_no_interval():
    assert mean_interval([2.0]) == {"mean": 2.0, "low": None, "high": None}


def test_wilson_interval_of_nine_in_ten():
    np.testing.assert_allclose(wilson_interval(0.9, 10), (0.59585, 0.98212), atol=1e-4)
