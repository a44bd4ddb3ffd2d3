"""The further terms of the compound reward against formulas in NumPy, and their options."""

import dataclasses

import numpy as np
import pytest

from sarm_jax.io.errors import InputError
from sarm_jax.rewards.compound import ScoreScale, StateReadings, compound_reward, learned_reward
from sarm_jax.rewards.reward_config import FURTHER_TERMS, RewardConfig

SCORE = np.array([-0.1, 0.5, 2.0, 0.3], np.float32)
Z = np.array([[0.0, 4.0], [3.5, 2.9], [0.0, 0.0], [0.0, 0.0]], np.float32)
MARGIN = np.array([0.2, -0.1, 0.0, 1e-6], np.float32)
DISTANCE = np.array([1.0, 2.0, 30.0, 4.0], np.float32)
LENGTHS = np.array([3, 10, 7, 256])
D = np.array([1.0, -2.0, 0.0, 0.5], np.float32)
MEAN, STD = 0.25, 0.5
FEATURES = {"penalize_features": (7, 9), "tau_values": (3.0, 3.0), "alpha_values": (0.1, 0.2)}
PROBE = {"probe": "p.safetensors", "probe_penalty": 0.4}
DISTANT = {"human_states": "h.safetensors", "distance_penalty": 0.05}
ALL = {**FEATURES, **PROBE, **DISTANT, "beta": 0.3, "length_penalty": 0.01, "bound": "sigmoid"}
SCREEN = {**FEATURES, "alpha_values": (), "probe": "p.safetensors", "screen": True}


def terms_of(config: RewardConfig, **arrays):
    given = {"score_b": SCORE, "z_bn": Z[:, : len(config.penalize_features)], "d_b": D}
    states = StateReadings(arrays.pop("margin_b", MARGIN), arrays.pop("distance_b", DISTANCE))
    return compound_reward(
        config,
        **{**given, **arrays},
        score_std=STD,
        score_mean=MEAN,
        states=states,
        lengths_b=LENGTHS,
    )


@pytest.mark.parametrize("unit", ["score", "sd"])
@pytest.mark.parametrize("cap", [0.7, 1.2, float("inf")])
def test_every_term_by_hand(unit, cap):
    u = {"score": 1.0, "sd": STD}[unit]
    terms = terms_of(RewardConfig(**ALL, unit=unit, penalty_cap=cap))
    capped = {
        "features": u * ((Z > 3.0) * [0.1, 0.2]).sum(axis=1),
        "kl": u * 0.3 * D,
        "probe": u * 0.4 * (MARGIN > 0),
        "distance": u * 0.05 * DISTANCE,
    }
    total = sum(capped.values())
    share = np.where(total > cap * STD, cap * STD / np.where(total == 0, 1, total), 1)
    assert (share < 1).any() == np.isfinite(cap)
    np.testing.assert_allclose(terms.penalty_bn.sum(axis=1), share * capped["features"], rtol=1e-6)
    np.testing.assert_allclose(terms.kl_penalty_b, share * capped["kl"], rtol=1e-6)
    expected = {
        "probe_penalty": share * capped["probe"],
        "distance_penalty": share * capped["distance"],
        "length_penalty": u * 0.01 * LENGTHS,
    }
    bounded = MEAN + u * (1 / (1 + np.exp(-(SCORE.astype(float) - MEAN) / u)) - 0.5)
    expected["bound_deduction"] = SCORE - bounded
    assert list(terms.further) == list(FURTHER_TERMS)
    for name, values in expected.items():
        np.testing.assert_allclose(terms.further[name], values, rtol=2e-6, atol=1e-7)
        assert terms.further[name].dtype == np.float32
        assert terms.further_means[name] == pytest.approx(values.mean(), rel=1e-5, abs=1e-6)
    np.testing.assert_allclose(terms.bounded_b, bounded, rtol=1e-5)
    controls = share * total + expected["length_penalty"]
    np.testing.assert_allclose(terms.controls_b, controls, rtol=1e-5)
    np.testing.assert_allclose(terms.total_b, bounded - controls, rtol=1e-5)


def test_what_is_learned_from_a_response_without_an_end():
    terms, scale = terms_of(RewardConfig(**ALL)), ScoreScale(MEAN, STD)
    ended = np.array([True, False, True, False])
    learned = learned_reward(terms, scale=scale, ended_b=ended, missing_eos_penalty=1.0)
    most = terms.controls_b.max()
    cut = np.minimum((terms.bounded_b - MEAN) / STD, 0) - most / STD - 1.0
    kept = (terms.total_b - MEAN) / STD
    np.testing.assert_allclose(learned, np.where(ended, kept, cut), rtol=1e-5)


@pytest.mark.parametrize("options", [PROBE, DISTANT, {"length_penalty": 0.1}, {"bound": "sigmoid"}])
def test_each_term_alone(options):
    config = RewardConfig(**options)
    (name,) = config.further_terms
    terms = terms_of(config, d_b=0 * D)
    assert list(terms.further) == [name] and name in config.further_columns
    np.testing.assert_array_equal(terms.total_b, SCORE - terms.further[name])
    assert config.has_controls and not config.reads_features


def test_no_term_is_on_by_default():
    config = RewardConfig()
    terms = compound_reward(
        config, score_b=SCORE, z_bn=Z[:, :0], d_b=0 * D, score_std=STD, score_mean=MEAN
    )
    assert not terms.further and terms.screened_b is None and not terms.further_means
    assert config.further_columns == () and not config.has_controls
    np.testing.assert_array_equal(terms.total_b, SCORE)


@pytest.mark.parametrize("bad", [np.nan, np.inf])
@pytest.mark.parametrize("name", ["score_b", "margin_b", "distance_b"])
@pytest.mark.parametrize("options", [ALL, SCREEN | DISTANT | {"bound": "sigmoid"}])
def test_a_number_that_is_not_finite_is_never_waived_or_screened(options, name, bad):
    arrays = {"score_b": SCORE, "margin_b": MARGIN, "distance_b": DISTANCE}
    poisoned = arrays[name].copy()
    poisoned[1] = bad
    with np.errstate(invalid="ignore"):
        terms = terms_of(RewardConfig(**options), **{name: poisoned})
        for missing_eos_penalty in (0.0, 1.0):
            learned = learned_reward(
                terms,
                scale=ScoreScale(MEAN, STD),
                ended_b=np.ones(4, bool),
                missing_eos_penalty=missing_eos_penalty,
            )
            assert np.isnan(learned[1])
    assert terms.screened_b is None or not terms.screened_b[1]


def test_screening_by_hand():
    terms = terms_of(RewardConfig(**SCREEN, beta=0.3))
    np.testing.assert_array_equal(terms.screened_b, [True, True, False, True])
    assert not terms.penalty_bn.any() and not terms.further
    assert terms.further_means == {"screened_fraction": 0.75}
    assert terms.further_of(0) == {"screened": True} and terms.further_of(2) == {"screened": False}
    np.testing.assert_allclose(terms.total_b, SCORE - 0.3 * D, rtol=1e-6)
    features = terms_of(RewardConfig(**{**SCREEN, "probe": ""}), margin_b=None)
    np.testing.assert_array_equal(features.screened_b, [True, True, False, False])


def test_screened_responses_do_not_bound_the_others():
    """c, the most that a response pays, is that of responses which are learned from."""
    config, scale = RewardConfig(**SCREEN, beta=0.3), ScoreScale(MEAN, STD)
    terms = terms_of(config, d_b=np.array([9.0, 9.0, 0.5, 9.0], np.float32))
    ended = np.array([True, True, False, True])
    learned = learned_reward(terms, scale=scale, ended_b=ended, missing_eos_penalty=1.0)
    assert learned[2] == pytest.approx(-0.3 * 0.5 / STD - 1.0)
    alone = dataclasses.replace(
        terms,
        score_b=terms.score_b[2:3],
        penalty_bn=terms.penalty_bn[2:3],
        kl_penalty_b=terms.kl_penalty_b[2:3],
        screened_b=terms.screened_b[2:3],
    )
    own = learned_reward(alone, scale=scale, ended_b=ended[2:3], missing_eos_penalty=1.0)
    np.testing.assert_array_equal(own, learned[2:3])
    none = dataclasses.replace(terms, screened_b=np.ones(4, bool))
    assert np.isfinite(
        learned_reward(none, scale=scale, ended_b=ended, missing_eos_penalty=1.0)
    ).all()


REFUSED = {
    "reward.probe_penalty=-1.0": {"probe": "p", "probe_penalty": -1.0},
    "reward.probe_penalty=0.4 needs a probe": {"probe_penalty": 0.4},
    "reward.distance_penalty=inf": {"human_states": "h", "distance_penalty": float("inf")},
    "reward.distance_penalty=0.1 needs human states": {"distance_penalty": 0.1},
    "reward.length_penalty=nan": {"length_penalty": float("nan")},
    "reward.bound='tanh'": {"bound": "tanh"},
    "reward.screen=True: needs": {"screen": True},
    "reward.alpha_values=0.1,0.2: reward.screen=True": {**FEATURES, "screen": True},
    "reward.probe_penalty=0.4: reward.screen=True": {**PROBE, "screen": True},
    "reward.tau_values has 1 values for 2": {**SCREEN, "tau_values": (1.0,)},
}


@pytest.mark.parametrize("message", REFUSED)
def test_options_that_do_not_go_together(message):
    with pytest.raises(InputError) as error:
        RewardConfig(**REFUSED[message])
    assert message in str(error.value)
