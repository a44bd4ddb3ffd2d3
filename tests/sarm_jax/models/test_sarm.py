"""Interventions, pooling and batching of a SARM; parity with torch is in test_conversion.py."""

import jax.numpy as jnp
import numpy as np
import pytest

from sarm_jax.io.errors import InputError
from sarm_jax.models.sae import standardise, top_k
from sarm_jax.models.sarm import intervention, last_position
from tests.closeness import assert_close

PROMPTS = ["say one", "a somewhat longer prompt than the first", "x"]
RESPONSES = ["one", "yes, that it is", "a response of quite a few more words than the others"]


def test_standardise_by_hand():
    h = np.array([[1.0, 2.0, 3.0, 6.0]], np.float32)
    expected = (h - 3.0) / (np.sqrt(14 / 3) + 1e-6)  # Σ(h − 3)² = 14, ddof 1
    np.testing.assert_allclose(standardise(jnp.asarray(h)), expected, rtol=1e-6)


def test_top_k_keeps_negative_values():
    kept = top_k(jnp.array([[-3.0, -1.0, -2.0, -5.0]]), 2)
    np.testing.assert_array_equal(kept, [[0.0, -1.0, -2.0, 0.0]])


def test_last_position_with_padding_on_any_side():
    mask = jnp.array([[1, 1, 1, 0], [0, 1, 1, 1], [1, 0, 1, 0]])
    assert last_position(mask).tolist() == [2, 3, 2]


def test_latents_are_sparse_and_add_up_to_the_score(reward_model):
    score, z = reward_model.score(PROMPTS, RESPONSES)
    assert ((z != 0).sum(axis=1) == 8).all()
    weights = np.asarray(reward_model.model.score[...])
    assert_close(score, z @ weights, 1e-6, terms=z * weights)
    assert score.std() > 0


def test_score_does_not_depend_on_its_batch(reward_model):
    together, z = reward_model.score(PROMPTS * 5, RESPONSES * 5)
    for i in range(3):
        alone, z_alone = reward_model.score([PROMPTS[i]], [RESPONSES[i]])
        assert_close(alone[0], together[i], 2e-6, together)
        assert_close(z_alone[0], z[i], 3e-6)
    assert_close(together.reshape(5, 3), np.tile(together[:3], (5, 1)), 1e-6)


@pytest.mark.parametrize(
    ("options", "change"),
    [
        ({"set_to": {3: 0.7}}, lambda z: 0.7),
        ({"minimum": {3: 2.0}}, lambda z: max(z, 2.0)),
        ({"maximum": {3: -1.0}}, lambda z: min(z, -1.0)),
        ({"steer": {3: ("*", 0.5)}}, lambda z: 0.5 * z),
        ({"steer": {3: ("+", 1.5)}}, lambda z: z + 1.5),
        ({"steer": {3: ("*", 4.0)}, "maximum": {3: 1.0}}, lambda z: min(4 * z, 1.0)),
    ],
)
def test_a_changed_feature_moves_the_reward_by_its_weight(reward_model, options, change):
    weight = float(reward_model.model.score[...][3])
    base, z = reward_model.score(PROMPTS, RESPONSES)
    moved, z_after = reward_model.score(PROMPTS, RESPONSES, intervention(64, **options))
    np.testing.assert_array_equal(z_after, z)  # the returned latents are the unchanged ones
    expected = [weight * (change(value) - value) for value in z[:, 3]]
    assert_close(moved - base, expected, 2e-6, terms=base)


def test_clamp_as_a_dictionary_and_columns(reward_model):
    by_dict, z = reward_model.score(PROMPTS, RESPONSES, {3: 0.0, 9: 1.0}, latent_indices=(9, 3))
    change = intervention(64, set_to={3: 0.0, 9: 1.0})
    full, z_full = reward_model.score(PROMPTS, RESPONSES, change)
    np.testing.assert_array_equal(by_dict, full)
    assert_close(z, z_full[:, [9, 3]], 1e-6, terms=z_full)


def test_head_edit_removes_a_feature(reward_model):
    base, z = reward_model.score(PROMPTS, RESPONSES)
    feature = int(np.argmax(np.abs(z[0])))
    weight = float(reward_model.model.score[...][feature])
    score = reward_model.model.score
    score[...] = score[...].at[feature].set(0.0)
    edited, _ = reward_model.score(PROMPTS, RESPONSES)
    assert_close(base - edited, weight * z[:, feature], 2e-6, terms=base)


def test_new_interventions_do_not_recompile(reward_model):
    from sarm_jax.models import reward_model as module

    reward_model.score(PROMPTS, RESPONSES, {3: 0.0})
    before = module._score._cache_size()
    reward_model.score(PROMPTS, RESPONSES, {5: 1.0})
    assert module._score._cache_size() == before


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"set_to": {64: 0.0}}, "feature 64 does not exist: the SAE has 64 latents"),
        ({"minimum": {1: 2.0}, "maximum": {1: 1.0}}, "minimum 2.0 exceeds its maximum 1.0"),
        ({"set_to": {1: 2.0}, "maximum": {1: 1.0}}, "feature 1 is set to 2.0"),
        ({"steer": {1: ("/", 2.0)}}, "operation '/'"),
    ],
)
def test_bad_interventions(options, message):
    with pytest.raises(InputError, match=message):
        intervention(64, **options)
