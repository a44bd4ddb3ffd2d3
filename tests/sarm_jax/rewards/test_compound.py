"""The compound reward, term by term, against the definition evaluated by hand."""

import dataclasses

import jax.numpy as jnp
import numpy as np
import pytest

from sarm_jax.evaluation.controls import Controls, penalties
from sarm_jax.io.errors import InputError
from sarm_jax.rewards.compound import RewardTerms, ScoreScale, compound_reward, learned_reward
from sarm_jax.rewards.reward_config import RewardConfig
from tests.tiny_models import reward_options

SCORE = np.array([-0.1, 0.02, 0.0], np.float32)
Z = np.array([[0.0, 4.0], [3.0, 2.9], [3.01, 5.0]], np.float32)
NO_D = np.zeros(3, np.float32)


def two_penalties(*alpha: float, tau: float = 3.0, **changes) -> RewardConfig:
    """Returns options that penalise two features."""
    return reward_options(
        penalize_features=(7, 9), tau_values=(tau, tau), alpha_values=alpha, **changes
    )


def terms_of(config: RewardConfig, d_b=NO_D, z_bn=Z, score_std=0.05) -> RewardTerms:
    return compound_reward(
        config, score_b=SCORE, z_bn=z_bn, d_b=d_b, score_std=score_std, score_mean=0.0
    )


def test_indicator_is_strict_and_per_feature():
    terms = terms_of(two_penalties(0.1, 0.2))
    np.testing.assert_allclose(terms.penalty_bn, [[0, 0.2], [0, 0], [0.1, 0.2]], rtol=1e-6)
    np.testing.assert_allclose(terms.total_b, [-0.3, 0.02, -0.3], rtol=1e-5)


def test_no_controls_is_exactly_the_reward_model():
    d_b = np.array([5.0, -3.0, 1.0], np.float32)
    terms = terms_of(two_penalties(0.0, 0.0, tau=0.0, beta=0.0), d_b)
    np.testing.assert_array_equal(terms.total_b, SCORE)
    without = terms_of(reward_options(), z_bn=Z[:, :0])
    np.testing.assert_array_equal(without.total_b, SCORE)


def test_unit_sd_scales_alpha_and_beta():
    d_b = np.array([1.0, -2.0, 0.5], np.float32)
    expected = terms_of(two_penalties(0.1, 0.2, beta=0.3), d_b)
    in_sd = terms_of(two_penalties(2.0, 4.0, beta=6.0, unit="sd"), d_b)
    np.testing.assert_allclose(in_sd.total_b, expected.total_b, rtol=1e-5)


def test_latent_kl_enters_with_beta():
    d_b = np.array([2, 0, -2.0])
    terms = terms_of(reward_options(beta=0.5), d_b, z_bn=Z[:, :0], score_std=1.0)
    np.testing.assert_allclose(terms.total_b, SCORE - [1.0, 0.0, -1.0], rtol=1e-6)


def test_normalised_reference_scores_have_zero_mean_and_unit_deviation():
    normalised = ScoreScale.estimate(SCORE, SCORE).normalise(SCORE)
    assert normalised.dtype == np.float32
    np.testing.assert_allclose([normalised.mean(), normalised.std()], [0, 1], atol=1e-6)


def test_constant_scores_are_refused():
    with pytest.raises(InputError, match="standard deviation of 0.0"):
        ScoreScale.estimate(np.zeros(4), np.zeros(4))


def test_clamp_combines_set_minimum_and_maximum():
    config = reward_options(
        clamp_features=(1, 2),
        clamp_set_values=(0.0, None),
        clamp_max_values=(None, 3.0),
    )
    z = np.array([[5.0, 5.0, 5.0], [1.0, 1.0, 1.0]], np.float32)
    np.testing.assert_array_equal(config.clamp(3)(jnp.asarray(z)), [[5, 0, 3], [1, 0, 1]])


def test_the_cap_bounds_penalties_and_latent_kl_together():
    d_b = np.array([2.0, -3.0, 1.0], np.float32)  # controls: 2 + 1, −1.5, 1 + 2 + 0.5
    terms = terms_of(two_penalties(1.0, 2.0, beta=0.5, penalty_cap=40.0), d_b)  # 40 · 0.05 = 2
    np.testing.assert_allclose(terms.controls_b, [2.0, -1.5, 2.0], rtol=1e-6)
    np.testing.assert_allclose(terms.penalty_bn[0], [0, 2 * 2 / 3], rtol=1e-6)
    np.testing.assert_allclose(terms.kl_penalty_b, [2 / 3, -1.5, 0.5 * 2 / 3.5], rtol=1e-6)
    np.testing.assert_allclose(terms.total_b, SCORE - terms.controls_b, rtol=1e-6)


@pytest.mark.parametrize("cap", [10.0, float("inf")])
def test_below_the_cap_nothing_changes(cap):
    d_b = np.array([1.0, -2.0, 0.5], np.float32)
    terms = terms_of(two_penalties(0.1, 0.2, beta=0.1, penalty_cap=cap), d_b)
    np.testing.assert_allclose(terms.penalty_bn, [[0, 0.2], [0, 0], [0.1, 0.2]], rtol=1e-6)
    np.testing.assert_allclose(terms.kl_penalty_b, [0.1, -0.2, 0.05], rtol=1e-6)


@pytest.mark.parametrize("unit", ["score", "sd"])
def test_training_and_evaluation_take_the_same(unit):
    rng = np.random.default_rng(0)
    z_bn = rng.exponential(size=(200, 3)).astype(np.float32)
    tau, alpha, score_std = (0.3, 0.7, 1.5), (0.2, 0.9, 2.0), 0.37
    options = reward_options(
        penalize_features=(4, 8, 15), tau_values=tau, alpha_values=alpha, unit=unit, penalty_cap=3.0
    )
    terms = compound_reward(
        options,
        score_b=np.zeros(200, np.float32),
        z_bn=z_bn,
        d_b=np.zeros(200, np.float32),
        score_std=score_std,
        score_mean=0.0,
    )
    controls = Controls(None, (4, 8, 15), tau, alpha, unit, 3.0)
    penalty_bj, taken_b = penalties(controls, z_bn, score_std)
    np.testing.assert_allclose(terms.controls_b, taken_b, rtol=1e-6)
    uncapped = penalty_bj.sum(axis=1) <= 3.0 * score_std
    assert 0 < uncapped.sum() < 200
    np.testing.assert_array_equal(terms.penalty_bn[uncapped], penalty_bj[uncapped])


def test_learned_reward_by_hand():
    scale = ScoreScale(mean=1.0, std=2.0)
    score = np.array([5.0, 5.0, -3.0, -3.0], np.float32)
    penalty = np.array([[4.0], [0.0], [0.0], [0.0]], np.float32)
    terms = RewardTerms(score, penalty, np.zeros(4, np.float32))
    ended = np.array([True, False, True, False])

    def learned(missing_eos_penalty):
        return learned_reward(
            terms, scale=scale, ended_b=ended, missing_eos_penalty=missing_eos_penalty
        )

    # Ended: (5 − 4 − 1) / 2 and (−3 − 1) / 2. Not ended: min(2, 0) − 4/2 − 1 and −2 − 4/2 − 1.
    np.testing.assert_allclose(learned(1.0), [0, -3, -2, -5])
    # Without a penalty responses need not end.
    np.testing.assert_allclose(learned(0.0), [0, 2, -2, -2])


@pytest.mark.parametrize("bad", [np.nan, np.inf, -np.inf])
@pytest.mark.parametrize("missing_eos_penalty", [0.0, 1.0])
@pytest.mark.parametrize("ended", [True, False])
def test_a_number_that_is_not_finite_makes_the_learned_reward_nan(bad, missing_eos_penalty, ended):
    config = two_penalties(0.1, 0.2, beta=0.1)
    for name in ("score_b", "z_bn", "d_b"):
        arrays = {"score_b": SCORE.copy(), "z_bn": Z.copy(), "d_b": NO_D.copy()}
        arrays[name][1] = bad
        reward_b = learned_reward(
            compound_reward(config, **arrays, score_std=0.05, score_mean=0.0),
            scale=ScoreScale(0.0, 0.05),
            ended_b=np.array([True, ended, True]),
            missing_eos_penalty=missing_eos_penalty,
        )
        assert np.isnan(reward_b[1]), name
        assert np.isfinite(reward_b[0]), name


@pytest.mark.parametrize("cap", [2.0, float("inf")])
def test_gibberish_without_an_end_gains_nothing(cap):
    """It gains nothing at any score, whatever penalties of other responses it escapes."""
    rng = np.random.default_rng(0)
    scale = ScoreScale(mean=0.3, std=0.7)
    config = reward_options(
        penalize_features=(0, 1, 2),
        tau_values=(0.5,) * 3,
        alpha_values=(3.0, 5.0, 20.0),
        beta=0.5,
        unit="sd",
        penalty_cap=cap,
    )
    for _ in range(50):
        score = rng.normal(0.3, 3, size=16).astype(np.float32)
        z, d = rng.exponential(size=(16, 3)), rng.normal(scale=3, size=16)
        ended = rng.random(16) < 0.5
        z[~ended], d[~ended] = 0, -5  # no penalty fires, and the latents look human

        def learned(score, z=z, d=d, ended=ended):
            terms = compound_reward(
                config, score_b=score, z_bn=z, d_b=d, score_std=0.7, score_mean=0.0
            )
            return learned_reward(terms, scale=scale, ended_b=ended, missing_eos_penalty=1.0)

        reward = learned(score)
        assert (reward[~ended] <= -1).all()
        # The same score as that of the most penalised response, but without an end.
        twin = int(np.argmin(np.where(ended, reward, np.inf)))
        score[~ended] = score[twin]
        reward = learned(score)
        assert (reward[~ended] <= reward[twin] - 1 + 1e-5).all()


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"penalize_features": (1, 2), "tau_values": (1.0,), "alpha_values": (1.0, 1.0)},
         "reward.tau_values has 1 values for 2 reward.penalize_features"),
        ({"penalize_features": (1,), "tau_values": (1.0,), "alpha_values": ()},
         "reward.alpha_values has 0 values for 1 reward.penalize_features"),
        ({"penalize_features": (1,), "tau_values": (-1.0,), "alpha_values": (1.0,)},
         "reward.tau_values: -1.0"),
        ({"penalize_features": (1,), "tau_values": (1.0,), "alpha_values": (-0.5,)},
         "reward.alpha_values: -0.5"),
        ({"penalize_features": (1, 1), "tau_values": (1.0, 2.0), "alpha_values": (1.0, 1.0)},
         "reward.penalize_features: feature 1 is given twice"),
        ({"clamp_features": (1,)}, "reward.clamp_features=1 with no clamp values"),
        ({"clamp_set_values": (0.0,)},
         "reward.clamp_features=\\(none\\) with reward.clamp_set_values"),
        ({"clamp_features": (1, 2), "clamp_min_values": (0.0,)},
         "reward.clamp_min_values has 1 values for 2 reward.clamp_features"),
        ({"beta": -1.0}, "reward.beta=-1.0"),
        ({"beta": float("nan")}, "reward.beta=nan"),
        ({"penalty_cap": 0.0}, "reward.penalty_cap=0.0"),
        ({"unit": "percent"}, "reward.unit='percent'"),
    ],
)  # fmt: skip
def test_errors_name_the_option_and_its_value(options, message):
    with pytest.raises(InputError, match=f"^{message}"):
        reward_options(**options)


def test_feature_beyond_the_sarm():
    config = dataclasses.replace(two_penalties(1.0, 1.0), penalize_features=(1, 64))
    with pytest.raises(InputError, match="^reward.penalize_features: feature 64 of a SARM with 64"):
        config.check_features(64)
