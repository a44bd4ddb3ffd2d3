"""The penalty on features that fire and its cap, by hand."""

import numpy as np
import pytest

from sarm_jax.features.penalties import (
    cap_in_score,
    capped,
    fired_penalties,
    share_within_cap,
    unit_scale,
)

Z = np.array([[0.0, 4.0], [3.0, 2.9], [3.01, 5.0]], np.float32)


@pytest.mark.parametrize(("unit", "factor"), [("score", 1.0), ("sd", 0.5)])
def test_a_feature_fires_above_its_threshold(unit, factor):
    scale = unit_scale(unit, 0.5)
    penalty = fired_penalties(Z, tau_values=(3.0, 4.0), alpha_values=(1.0, 2.0), scale=scale)
    assert penalty.dtype == np.float32
    np.testing.assert_array_equal(penalty, factor * np.array([[0, 0], [0, 0], [1, 2]]))


@pytest.mark.parametrize("bad", [np.nan, np.inf, -np.inf])
def test_the_penalty_of_a_latent_that_is_not_finite_is_nan(bad):
    z = np.array([[bad, 1.0]], np.float32)
    scale = unit_scale("score", 1.0)
    penalty = fired_penalties(z, tau_values=(0.0, 0.0), alpha_values=(1.0, 1.0), scale=scale)
    np.testing.assert_array_equal(penalty, [[np.nan, 1.0]])


def test_cap_by_hand():
    sums = np.array([0.5, 2.0, 8.0, -1.0, np.nan], np.float32)
    cap = cap_in_score(4.0, 0.5)
    np.testing.assert_array_equal(capped(sums, cap), np.float32([0.5, 2.0, 2.0, -1.0, np.nan]))
    np.testing.assert_array_equal(share_within_cap(sums, cap), np.float32([1, 1, 0.25, 1, 1]))


@pytest.mark.parametrize(("penalty_cap", "score_std"), [(float("inf"), 0.5), (4.0, 0.0)])
def test_no_cap(penalty_cap, score_std):
    assert cap_in_score(penalty_cap, score_std) == np.inf
