"""The compound reward, term by term, against the definition evaluated by hand."""

import jax.numpy as jnp
import numpy as np
import pytest

from ppo.reward import RewardConfig, RewardTerms, ScoreScale, compound_reward, learned_reward
from sarm_jax.io.errors import InputError

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
    scale = ScoreScale.of(SCORE, SCORE)
    normalised = scale.normalise(SCORE)
    assert normalised.dtype == np.float32
    np.testing.assert_allclose([normalised.mean(), normalised.std()], [0, 1], atol=1e-6)


def test_constant_scores_are_refused():
    with pytest.raises(InputError, match="standard deviation of 0.0"):
        ScoreScale.of(np.zeros(4), np.zeros(4))


def test_clamp_combines_set_minimum_and_maximum():
    config = RewardConfig(
        clamp_features=(1, 2),
        clamp_set_values=(0.0, None),
        clamp_max_values=(None, 3.0),
    )
    z = np.array([[5.0, 5.0, 5.0], [1.0, 1.0, 1.0]], np.float32)
    np.testing.assert_array_equal(config.clamp(3)(jnp.asarray(z)), [[5, 0, 3], [1, 0, 1]])


def test_the_cap_bounds_penalties_and_latent_kl_together():
    config = RewardConfig((7, 9), (3.0, 3.0), (1.0, 2.0), beta=0.5, penalty_cap=40.0)
    ratio = np.array([2.0, -3.0, 1.0], np.float32)  # controls 2 + 1, −1.5, 1 + 2 + 0.5
    terms = compound_reward(config, SCORE, Z, ratio, 0.05)  # the cap is 40 · 0.05 = 2
    np.testing.assert_allclose(terms.controls_b, [2.0, -1.5, 2.0], rtol=1e-6)
    np.testing.assert_allclose(terms.penalty_bn[0], [0, 2 * 2 / 3], rtol=1e-6)
    np.testing.assert_allclose(terms.kl_penalty_b, [2 / 3, -1.5, 0.5 * 2 / 3.5], rtol=1e-6)
    np.testing.assert_allclose(terms.total_b, SCORE - terms.controls_b, rtol=1e-6)


def test_below_the_cap_nothing_changes():
    capped = RewardConfig((7, 9), (3.0, 3.0), (0.1, 0.2), beta=0.1, penalty_cap=10.0)
    free = RewardConfig((7, 9), (3.0, 3.0), (0.1, 0.2), beta=0.1)
    ratio = np.array([1.0, -2.0, 0.5], np.float32)
    for config in (capped, free):
        terms = compound_reward(config, SCORE, Z, ratio, 0.05)
        np.testing.assert_allclose(terms.penalty_bn, [[0, 0.2], [0, 0], [0.1, 0.2]], rtol=1e-6)
        np.testing.assert_allclose(terms.kl_penalty_b, [0.1, -0.2, 0.05], rtol=1e-6)


def test_learned_reward_by_hand():
    scale = ScoreScale(mean=1.0, std=2.0)
    score = np.array([5.0, 5.0, -3.0, -3.0], np.float32)
    penalty = np.array([[4.0], [0.0], [0.0], [0.0]], np.float32)
    terms = RewardTerms(score, penalty, np.zeros(4, np.float32))
    ended = np.array([True, False, True, False])
    # Ended: (5 − 4 − 1) / 2 and (−3 − 1) / 2. Not ended: min(2, 0) − 4/2 − 1 and −2 − 4/2 − 1.
    np.testing.assert_allclose(learned_reward(terms, scale, ended, 1.0), [0, -3, -2, -5])
    # Responses that need not end.
    np.testing.assert_allclose(learned_reward(terms, scale, ended, 0.0), [0, 2, -2, -2])


@pytest.mark.parametrize("bad", [np.nan, np.inf, -np.inf])
@pytest.mark.parametrize("missing_eos_penalty", [0.0, 1.0])
@pytest.mark.parametrize("ended", [True, False])
def test_what_is_not_finite_cannot_hide_in_the_learned_reward(bad, missing_eos_penalty, ended):
    config = RewardConfig((7, 9), (3.0, 3.0), (0.1, 0.2), beta=0.1)
    scale = ScoreScale(0.0, 0.05)
    for spoilt in ("score", "latent", "ratio"):
        parts = {"score": SCORE.copy(), "latent": Z.copy(), "ratio": np.zeros(3, np.float32)}
        parts[spoilt][1] = bad  # of a latent: every penalised one of the row
        terms = compound_reward(config, parts["score"], parts["latent"], parts["ratio"], 0.05)
        ended_b = np.array([True, ended, True])
        reward_b = learned_reward(terms, scale, ended_b, missing_eos_penalty)
        assert np.isnan(reward_b[1]), spoilt


@pytest.mark.parametrize("cap", [2.0, float("inf")])
def test_gibberish_without_an_end_gains_nothing(cap):
    """Whatever it scores and however it dodges the penalties that responses with an end pay."""
    rng = np.random.default_rng(0)
    scale = ScoreScale(mean=0.3, std=0.7)
    config = RewardConfig(
        (0, 1, 2), (0.5,) * 3, (3.0, 5.0, 20.0), beta=0.5, unit="sd", penalty_cap=cap
    )
    for _ in range(50):
        score = rng.normal(0.3, 3, size=16).astype(np.float32)
        z, ratio = rng.exponential(size=(16, 3)), rng.normal(scale=3, size=16)
        ended = rng.random(16) < 0.5
        z[~ended], ratio[~ended] = 0, -5  # no penalty fires, and the latents look human
        dodging = learned_reward(compound_reward(config, score, z, ratio, 0.7), scale, ended, 1.0)
        assert (dodging[~ended] <= -1).all()
        # The same words as those of the most penalised response, but with no end.
        twin = int(np.argmin(np.where(ended, dodging, np.inf)))
        score[~ended] = score[twin]
        terms = compound_reward(config, score, z, ratio, 0.7)
        reward = learned_reward(terms, scale, ended, 1.0)
        assert (reward[~ended] <= reward[twin] - 1 + 1e-5).all()


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
        ({"penalty_cap": 0.0}, "reward.penalty_cap=0.0"),
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
