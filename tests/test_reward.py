"""The compound reward, term by term, against the definition evaluated by hand."""

import jax.numpy as jnp
import numpy as np
import pytest

from ppo.reward import RewardConfig, ScoreScale, compound_reward
from sarm_jax.errors import InputError

SCORE = np.array([-0.1, 0.02, 0.0], np.float32)
Z = np.array([[0.0, 4.0], [3.0, 2.9], [3.01, 5.0]], np.float32)


def test_indicator_is_strict_and_per_feature():
    config = RewardConfig((7, 9), (3.0, 3.0), (0.1, 0.2))
    terms = compound_reward(config, SCORE, Z, np.zeros(3), 0.05)
    np.testing.assert_allclose(terms.penalty_bn, [[0, 0.2], [0, 0], [0.1, 0.2]], rtol=1e-6)
    np.testing.assert_allclose(terms.total_b, [-0.3, 0.02, -0.3], rtol=1e-5)


def test_no_controls_is_exactly_the_reward_model():
    config = RewardConfig((7, 9), (0.0, 0.0), (0.0, 0.0), beta=0.0)
    terms = compound_reward(config, SCORE, Z, np.array([5.0, -3.0, 1.0], np.float32), 0.05)
    np.testing.assert_array_equal(terms.total_b, SCORE)
    none = compound_reward(RewardConfig(), SCORE, Z[:, :0], np.zeros(3, np.float32), 0.05)
    np.testing.assert_array_equal(none.total_b, SCORE)


def test_unit_sd_scales_alpha_and_beta():
    raw = RewardConfig((7, 9), (3.0, 3.0), (0.1, 0.2), beta=0.3)
    in_sd = RewardConfig((7, 9), (3.0, 3.0), (2.0, 4.0), beta=6.0, unit="sd")
    ratio = np.array([1.0, -2.0, 0.5], np.float32)
    expected = compound_reward(raw, SCORE, Z, ratio, 0.05)
    found = compound_reward(in_sd, SCORE, Z, ratio, 0.05)
    np.testing.assert_allclose(found.total_b, expected.total_b, rtol=1e-5)


def test_latent_kl_enters_with_beta():
    terms = compound_reward(RewardConfig(beta=0.5), SCORE, Z[:, :0], np.array([2, 0, -2.0]), 1.0)
    np.testing.assert_allclose(terms.total_b, SCORE - [1.0, 0.0, -1.0], rtol=1e-6)


def test_normalised_reference_scores_have_zero_mean_and_unit_deviation():
    scale = ScoreScale.of(SCORE)
    normalised = scale.normalise(SCORE)
    assert normalised.dtype == np.float32
    np.testing.assert_allclose([normalised.mean(), normalised.std()], [0, 1], atol=1e-6)


def test_constant_scores_are_refused():
    with pytest.raises(InputError, match="standard deviation of 0.0"):
        ScoreScale.of(np.zeros(4))


def test_clamp_combines_set_minimum_and_maximum():
    config = RewardConfig(
        clamp_features=(1, 2),
        clamp_set_values=(0.0, None),
        clamp_max_values=(None, 3.0),
    )
    z = np.array([[5.0, 5.0, 5.0], [1.0, 1.0, 1.0]], np.float32)
    np.testing.assert_array_equal(config.clamp(3)(jnp.asarray(z)), [[5, 0, 3], [1, 0, 1]])


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"penalize_features": (1, 2), "tau_values": (1.0,), "alpha_values": (1.0, 1.0)},
         "tau_values has 1 values for 2 penalize_features"),
        ({"penalize_features": (1,), "tau_values": (1.0,), "alpha_values": ()},
         "alpha_values has 0 values for 1 penalize_features"),
        ({"penalize_features": (1,), "tau_values": (-1.0,), "alpha_values": (1.0,)},
         "tau_values: -1.0"),
        ({"penalize_features": (1,), "tau_values": (1.0,), "alpha_values": (-0.5,)},
         "alpha_values: -0.5"),
        ({"penalize_features": (1, 1), "tau_values": (1.0, 2.0), "alpha_values": (1.0, 1.0)},
         "feature 1 is given twice"),
        ({"clamp_features": (1,)}, "clamp_features=1 with no clamp values"),
        ({"clamp_set_values": (0.0,)}, "clamp_features=\\(none\\) with clamp_set_values"),
        ({"clamp_features": (1, 2), "clamp_min_values": (0.0,)}, "clamp_min_values has 1 values"),
        ({"beta": -1.0}, "beta=-1.0"),
        ({"beta": float("nan")}, "beta=nan"),
        ({"unit": "percent"}, "reward.unit='percent'"),
    ],
)  # fmt: skip
def test_bad_options_name_the_value(options, message):
    with pytest.raises(InputError, match=message):
        RewardConfig(**options)


def test_feature_beyond_the_sarm():
    config = RewardConfig((64,), (1.0,), (1.0,))
    with pytest.raises(InputError, match="penalize_features: feature 64 of a SARM with 64"):
        config.check_features(64)
