"""The best of n, against all subsets one by one."""

import itertools

import numpy as np
import pytest

from sarm_jax.evaluation.best_of_n import best_of_n, best_of_n_weights, kl_of_best_of


@pytest.mark.parametrize("n", range(1, 7))
@pytest.mark.parametrize("ties", [False, True])
def test_it_is_the_mean_over_all_subsets(n, ties):
    rng = np.random.default_rng(0)
    reward_ps = rng.integers(0, 3, (4, 6)).astype(float) if ties else rng.normal(size=(4, 6))
    reward_ps[0, :2] = -np.inf  # two responses that are screened
    value_ps = rng.normal(size=(4, 6))
    expected = []
    for reward_s, value_s in zip(reward_ps, value_ps, strict=True):
        best = [
            np.mean(value_s[list(subset)][reward_s[list(subset)] == reward_s[list(subset)].max()])
            for subset in itertools.combinations(range(6), n)
        ]
        expected.append(np.mean(best))
    np.testing.assert_allclose(best_of_n(reward_ps, value_ps, n), expected, rtol=1e-12)


def test_weights_of_several_sizes_at_once():
    """Each size has the weights that it has alone; they are those of a share."""
    rng = np.random.default_rng(2)
    reward_ps = rng.integers(0, 9, (5, 16)).astype(float)
    weight_nps = best_of_n_weights(reward_ps, [1, 4, 16])
    np.testing.assert_allclose(weight_nps.sum(axis=2), 1)
    for weight_ps, n in zip(weight_nps, (1, 4, 16), strict=True):
        np.testing.assert_array_equal(weight_ps, best_of_n_weights(reward_ps, [n])[0])
        mean_p = [
            weight_s @ reward_s for weight_s, reward_s in zip(weight_ps, reward_ps, strict=True)
        ]
        np.testing.assert_allclose(best_of_n(reward_ps, reward_ps, n), mean_p)
    np.testing.assert_allclose(weight_nps[0], 1 / 16, rtol=1e-12)


def test_large_pools():
    rng = np.random.default_rng(1)
    reward_ps = rng.normal(size=(3, 4096))
    np.testing.assert_allclose(best_of_n(reward_ps, reward_ps, 4096), reward_ps.max(axis=1))
    np.testing.assert_allclose(best_of_n(reward_ps, reward_ps, 1), reward_ps.mean(axis=1))
    # The mean of the largest of 16 standard normal values is 1.766.
    assert best_of_n(reward_ps, reward_ps, 16).mean() == pytest.approx(1.766, abs=0.05)


def test_kl():
    np.testing.assert_allclose(kl_of_best_of(np.array([1, 2])), [0, np.log(2) - 0.5])


def test_what_is_refused():
    one = np.zeros((1, 3))
    for n in (0, 4):
        with pytest.raises(ValueError, match=f"n={n}: expected 1 to 3"):
            best_of_n(one, one, n)
    with pytest.raises(ValueError, match="NaN"):
        best_of_n(np.array([[0.0, np.nan]]), one[:, :2], 1)
