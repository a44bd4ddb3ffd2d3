"""Several heads on the same latents: their scores, and what reads them."""

import dataclasses

import jax
import numpy as np
import pytest
from flax import nnx

from ppo.comparison.policy_comparison import compare, response_rows, summary
from ppo.comparison.responses import Responses
from sarm_jax.evaluation.controls import Controls, score_variants
from sarm_jax.io.errors import InputError
from sarm_jax.models.attribution import attribution
from sarm_jax.models.reward_model import RewardModel
from sarm_jax.models.sae import ACTIVATIONS, SAEConfig
from sarm_jax.models.sarm import SARM, SARMConfig, centre_heads, intervention
from sarm_jax.parallel.sharding import TABLE, partition_spec
from sarm_jax.rewards import RewardConfig, ScoreScale, controlled_reward
from tests.closeness import assert_close
from tests.tiny_models import PROMPTS

HEADS = 3
RESPONSES = [f"well, it is {n}" for n in range(len(PROMPTS))]
ENSEMBLES = {
    "mean": lambda score_bh: score_bh.mean(axis=1),
    "min": lambda score_bh: score_bh.min(1),
}


@pytest.fixture
def ensemble(reward_model):
    """A model of three centred heads on the latents of `reward_model`."""
    old = reward_model.model
    sarm = SARM(SARMConfig(old.config.trunk, old.config.sae, HEADS), rngs=nnx.Rngs(1))
    sarm.trunk, sarm.sae = old.trunk, old.sae
    sarm.score[...] = jax.random.normal(jax.random.key(3), (HEADS, 64))
    model = RewardModel(sarm, reward_model.tokenizer, max_length=512, batch_size=8)
    _, z_bf = reward_model.score(PROMPTS, RESPONSES)
    sarm.score_bias[...] = centre_heads(by_hand(model, z_bf))
    return model


def by_hand(model, z_bf):
    """Returns the scores `[B, H]` of all heads, float64."""
    weights, bias = (
        np.asarray(p[...], np.float64) for p in (model.model.score, model.model.score_bias)
    )
    return z_bf.astype(np.float64) @ weights.T + bias


@pytest.mark.parametrize("name", ENSEMBLES)
@pytest.mark.parametrize("clamp", [None, {3: 0.7, 5: -1.0}])
def test_scores_by_hand(ensemble, reward_model, name, clamp):
    _, z_bf = reward_model.score(PROMPTS, RESPONSES)
    score_b, own_bf = ensemble.with_ensemble(name).score(PROMPTS, RESPONSES, clamp)
    np.testing.assert_array_equal(own_bf, z_bf)  # the latents do not depend on the heads
    changed = z_bf.copy()
    for feature, value in (clamp or {}).items():
        changed[:, feature] = value
    score_bh = by_hand(ensemble, changed)
    assert_close(score_b, ENSEMBLES[name](score_bh), terms=score_bh)
    assert len(set(score_bh.argmin(axis=1))) > 1  # no head is the worst of all responses
    stored_b, _ = ensemble.with_ensemble(name).store(PROMPTS, RESPONSES)
    if clamp is None:
        assert_close(stored_b, score_b, terms=score_bh)


def test_another_ensemble_is_another_view_of_the_same_weights(ensemble, reward_model):
    worst = ensemble.with_ensemble("min")
    assert ensemble.is_linear and not worst.is_linear
    assert worst.with_ensemble("min") is worst and ensemble.with_ensemble("mean") is ensemble
    pointer = ensemble.model.score[...].unsafe_buffer_pointer()
    assert worst.model.score[...].unsafe_buffer_pointer() == pointer
    np.testing.assert_array_equal(worst.feature_weights(), ensemble.feature_weights())
    assert_close(
        ensemble.feature_weights(), np.asarray(ensemble.model.score[...]).mean(axis=0), 1e-6
    )
    assert reward_model.with_ensemble("mean") is reward_model
    with pytest.raises(InputError, match=r"reward\.ensemble='min': the reward model has one head"):
        reward_model.with_ensemble("min")
    with pytest.raises(InputError, match=r"reward\.ensemble='median': expected one of mean, min"):
        ensemble.with_ensemble("median")
    with pytest.raises(InputError, match=r"reward\.ensemble='median': expected 'mean' or 'min'"):
        RewardConfig(ensemble="median")


def test_centred_heads_have_the_same_mean_and_no_bias_on_average():
    offset_h = np.asarray([3.0, -1.0, 0.0, 10.0])
    score_nh = np.random.default_rng(0).normal(size=(50, 4)) + offset_h
    bias_h = centre_heads(score_nh)
    assert_close((score_nh + bias_h).mean(axis=0), np.full(4, score_nh.mean()), 1e-6, score_nh)
    assert abs(bias_h.sum()) < 1e-5


@pytest.mark.parametrize("name", ENSEMBLES)
def test_the_compound_reward(ensemble, name):
    """Penalties and cap are those of one head: all heads read the same latents."""
    controls = RewardConfig(
        penalize_features=(3, 5),
        tau_values=(0.1, 0.2),
        alpha_values=(0.2, 0.1),
        ensemble=name,
    )
    rewards = controlled_reward(ensemble, controls, scale=ScoreScale(0.0, 1.0))(PROMPTS, RESPONSES)
    _, z_bf = ensemble.score(PROMPTS, RESPONSES)
    penalty_b = 0.2 * (z_bf[:, 3] > 0.1) + 0.1 * (z_bf[:, 5] > 0.2)
    assert penalty_b.any()
    score_bh = by_hand(ensemble, z_bf)
    assert_close(rewards, ENSEMBLES[name](score_bh) - penalty_b, terms=score_bh)


def test_one_head_cannot_be_the_worst_of_several(reward_model):
    with pytest.raises(InputError, match=r"reward\.ensemble='min': the reward model has one head"):
        controlled_reward(reward_model, RewardConfig(ensemble="min"))


@pytest.mark.parametrize("name", ENSEMBLES)
def test_attributions_add_up(ensemble, name):
    model = ensemble.with_ensemble(name)
    rows = attribution(model, PROMPTS[0], RESPONSES[0])
    score = model.score(PROMPTS[:1], RESPONSES[:1])[0][0]
    rewards = [row["reward"] for row in rows]
    assert_close(sum(rewards), score, terms=rewards)
    others = [row["part"] for row in rows if row["part"] != "feature"]
    assert others == (["ensemble"] if name == "min" else [])


@pytest.mark.parametrize("name", ENSEMBLES)
def test_evaluations_under_controls(ensemble, name):
    """A clamp, and the score without the controlled features, go through the worst head as well."""
    model = ensemble.with_ensemble(name)
    _, z_bf = model.score(PROMPTS, RESPONSES)
    first, second = np.argsort(-(z_bf > 0).mean(axis=0))[:2].tolist()
    controls = Controls(
        intervention=intervention(64, set_to={first: 3.0}),
        penalize_features=(second,),
        tau_values=(0.0,),
        alpha_values=(0.3,),
    )

    def score(values):
        changed = z_bf.copy()
        changed[:, list(values)] = list(values.values())
        return ENSEMBLES[name](by_hand(model, changed))

    penalty_b = 0.3 * (z_bf[:, second] > 0)
    expected = {
        "plain": score({}),
        "controlled": score({first: 3.0}),
        "penalised": score({first: 3.0}) - penalty_b,
    }
    variants = score_variants(model, PROMPTS, RESPONSES, controls).variants
    assert variants.keys() == expected.keys()
    for key, value in expected.items():
        assert_close(variants[key], value, 1e-5, name=key)

    count = len(RESPONSES)
    ones = {"length_n": np.ones(count), "ended_n": np.ones(count, bool), "kl_n": np.zeros(count)}
    responses = {"base": Responses(RESPONSES, **ones), "x": Responses(RESPONSES[::-1], **ones)}
    comparison = compare(model, controls, prompts=PROMPTS, responses=responses)
    own = comparison.scores["base"]
    assert_close(own.controlled_n, expected["penalised"], 1e-5)
    assert_close(own.without_n, score({first: 0.0, second: 0.0}), 1e-5)
    means = summary(comparison, resamples=10, seed=0)["runs"]["base"]
    assert_close(means["score_without"]["mean"], own.without_n.mean(), 1e-5)
    for row in response_rows(comparison):
        shown = row["responses"]["base"]
        assert sum(term[3] for term in shown["terms"]) + shown["rest"] == shown["score"]


def test_every_parameter_of_an_ensemble_has_a_place_on_a_mesh(ensemble):
    flat = nnx.to_flat_state(nnx.state(ensemble.model))
    paths = [".".join(map(str, path)) for path, _ in flat]
    assert "score_bias" in paths and TABLE
    mesh = jax.sharding.Mesh(
        np.asarray(jax.devices()[:1]).reshape(1, 1, 1), ("data", "fsdp", "tensor")
    )
    for path, (_, value) in zip(paths, flat, strict=True):
        partition_spec(path, value.shape, mesh)


def test_a_sarm_of_one_head_is_what_it_was():
    """One head has no biases, and its config compares and hashes as without the field."""
    config = SARMConfig("trunk", SAEConfig(4, latent_size=8, k=2))
    assert config == dataclasses.replace(config, heads=1)


@pytest.mark.parametrize("activation", ACTIVATIONS)
def test_a_sarm_has_no_sae_whose_activation_its_training_does_not_know(activation):
    """Its training reads pre-activations, which are the latents for topk and identity alone."""
    sae = SAEConfig(4, latent_size=8, k=2, activation=activation)
    if activation in ("topk", "identity"):
        assert SARMConfig("trunk", sae).sae == sae
        return
    with pytest.raises(InputError, match=f"sae.activation='{activation}': a SARM has topk or id"):
        SARMConfig("trunk", sae)
