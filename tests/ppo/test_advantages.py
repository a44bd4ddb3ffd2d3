"""GAE and per-token rewards against plain loops and hand-computed values."""

import jax.numpy as jnp
import numpy as np
import pytest

from ppo.advantages import gae, token_rewards, whiten
from tests.closeness import assert_close
from tests.oracles import gae_loop, masked_whiten_loop


def ragged_mask(rng, batch, length):
    ends = rng.integers(1, length + 1, batch)
    return np.arange(length)[None] < ends[:, None]


@pytest.mark.parametrize(("gamma", "lam"), [(1.0, 0.95), (0.9, 0.5), (1.0, 1.0), (0.99, 0.0)])
def test_gae_matches_loop(gamma, lam):
    rng = np.random.default_rng(0)
    rewards, values = rng.normal(size=(2, 7, 11)).astype(np.float32)
    mask = ragged_mask(rng, 7, 11)
    advantages, returns = gae(*map(jnp.asarray, (rewards, values, mask)), gamma, lam)
    expected_advantages, expected_returns = gae_loop(rewards, values, mask, gamma, lam)
    assert_close(advantages, expected_advantages, 5e-7)
    assert_close(np.where(mask, returns, 0), expected_returns, 5e-7)


def test_gae_by_hand():
    # One response of three tokens, reward 1 at its end, γ = 1, λ = 0.5.
    advantages, returns = gae(
        jnp.array([[0.0, 0.0, 1.0, 9.0]]),
        jnp.array([[0.5, 0.25, 0.125, 9.0]]),
        jnp.array([[1, 1, 1, 0]]),
        1.0,
        0.5,
    )
    # δ = (−0.25, −0.125, 0.875); A_2 = .875, A_1 = −.125 + .5·.875, A_0 = −.25 + .5·A_1
    np.testing.assert_allclose(advantages[0], [-0.09375, 0.3125, 0.875, 0.0], atol=1e-7)
    np.testing.assert_allclose(returns[0, :3], [0.40625, 0.5625, 1.0], atol=1e-7)


def test_rows_do_not_mix():
    rng = np.random.default_rng(1)
    rewards, values = rng.normal(size=(2, 4, 6)).astype(np.float32)
    mask = ragged_mask(rng, 4, 6)
    together, _ = gae(*map(jnp.asarray, (rewards, values, mask)), 1.0, 0.95)
    for b in range(4):
        alone, _ = gae(*(jnp.asarray(x[b : b + 1]) for x in (rewards, values, mask)), 1.0, 0.95)
        np.testing.assert_array_equal(together[b], alone[0])


def test_reward_lands_on_the_last_token_of_the_mask():
    mask = jnp.array([[1, 1, 1, 0], [1, 0, 0, 0], [1, 1, 1, 1]])
    kl = jnp.full((3, 4), 0.5)
    rewards = token_rewards(jnp.array([1.0, 2.0, 3.0]), kl, mask, kl_coef=0.1)
    expected = [[-0.05, -0.05, 0.95, 0], [1.95, 0, 0, 0], [-0.05, -0.05, -0.05, 2.95]]
    np.testing.assert_allclose(rewards, expected, atol=1e-7)


def test_float_scores_are_not_truncated():
    rewards = token_rewards(jnp.array([0.37]), jnp.zeros((1, 2)), jnp.array([[1, 1]]), 0.0)
    assert rewards.dtype == jnp.float32
    assert rewards[0, 1] == np.float32(0.37)


def test_no_bootstrap_when_the_budget_ran_out():
    # A response that fills the budget is treated as ended: V beyond its last token is 0.
    advantages, _ = gae(jnp.zeros((1, 3)), jnp.full((1, 3), 2.0), jnp.ones((1, 3)), 1.0, 1.0)
    np.testing.assert_allclose(advantages[0, -1], -2.0)


def test_whitening_is_masked_and_global():
    rng = np.random.default_rng(2)
    x = rng.normal(3, 5, size=(5, 8)).astype(np.float32)
    mask = ragged_mask(rng, 5, 8)
    whitened = whiten(jnp.asarray(x), jnp.asarray(mask))
    np.testing.assert_allclose(whitened, masked_whiten_loop(x, mask), atol=1e-5)


def test_padding_may_be_nan():
    rng = np.random.default_rng(3)
    rewards, values, kl = rng.normal(size=(3, 4, 6)).astype(np.float32)
    mask = ragged_mask(rng, 4, 6)
    score = rng.normal(size=4).astype(np.float32)

    def run(hole):
        r, v, k = (np.where(mask, x, hole) for x in (rewards, values, kl))
        advantages, _ = gae(jnp.asarray(r), jnp.asarray(v), jnp.asarray(mask), 1.0, 0.95)
        tokens = token_rewards(jnp.asarray(score), jnp.asarray(k), jnp.asarray(mask), 0.1)
        return advantages, whiten(advantages, jnp.asarray(mask)), tokens

    for clean, poisoned in zip(run(0.0), run(np.nan), strict=True):
        np.testing.assert_array_equal(clean, poisoned)
