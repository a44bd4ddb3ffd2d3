"""The clipped objective against plain float64 loops, and its invariants."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from ppo.losses import kl_k3, log_ratio, policy_loss, value_loss
from tests.oracles import ppo_loss_loop

CLIP = (0.2, 0.2)


@pytest.fixture
def arrays():
    rng = np.random.default_rng(0)
    logp = rng.normal(-2, 1, size=(5, 9)).astype(np.float32)
    old_logp = logp + rng.normal(0, 0.3, size=(5, 9)).astype(np.float32)
    advantages, values, old_values, returns = rng.normal(size=(4, 5, 9)).astype(np.float32)
    mask = np.arange(9)[None] < rng.integers(1, 10, 5)[:, None]
    return logp, old_logp, advantages, values, old_values, returns, mask


def losses(logp, old_logp, advantages, values, old_values, returns, mask, count):
    ratio = log_ratio(logp, old_logp, mask)
    policy = policy_loss(ratio, advantages, mask, CLIP, count)
    return policy, value_loss(values, old_values, returns, mask, 0.25, count)


def test_losses_match_loop(arrays):
    mask = arrays[-1]
    policy, value = losses(*map(jnp.asarray, arrays), mask.sum())
    expected = ppo_loss_loop(*arrays, clip_range=0.2, value_clip_range=0.25)
    np.testing.assert_allclose(policy, expected["policy_loss"], rtol=1e-5)
    np.testing.assert_allclose(value, expected["value_loss"], rtol=1e-5)


def test_padding_may_be_nan_in_loss_and_gradient(arrays):
    mask = jnp.asarray(arrays[-1])

    def loss(x, hole):
        holed = [jnp.where(mask, a, hole) for a in x]
        policy, value = losses(*holed, mask, mask.sum())
        return policy + value

    numbers = [jnp.asarray(a) for a in arrays[:-1]]
    clean, clean_grads = jax.value_and_grad(loss)(numbers, 0.0)
    poisoned, poisoned_grads = jax.value_and_grad(loss)(numbers, jnp.nan)
    np.testing.assert_array_equal(clean, poisoned)
    for a, b in zip(clean_grads, poisoned_grads, strict=True):
        np.testing.assert_array_equal(a, b)


def test_microbatches_sum_to_the_whole(arrays):
    whole = losses(*map(jnp.asarray, arrays), arrays[-1].sum())
    parts = [
        losses(*(jnp.asarray(a[rows]) for a in arrays), arrays[-1].sum())
        for rows in (slice(0, 2), slice(2, 5))
    ]
    np.testing.assert_allclose(np.sum(parts, axis=0), whole, rtol=1e-5)


def test_ratio_one_reduces_to_minus_mean_advantage(arrays):
    _, old_logp, advantages, *_, mask = map(jnp.asarray, arrays)
    loss = policy_loss(log_ratio(old_logp, old_logp, mask), advantages, mask, CLIP, mask.sum())
    np.testing.assert_allclose(loss, -advantages[mask].mean(), rtol=1e-5)


@pytest.mark.parametrize(("advantage", "moves"), [(1.0, False), (-1.0, True)])
def test_clipping_stops_only_the_profitable_direction(advantage, moves):
    # ρ = 1.5 is past 1 + ε: no gradient when raising it would gain, full gradient when not.
    def loss(logp):
        ratio = log_ratio(logp, jnp.zeros((1, 1)), jnp.ones((1, 1), bool))
        return policy_loss(ratio, jnp.full((1, 1), advantage), jnp.ones((1, 1), bool), CLIP, 1)

    gradient = jax.grad(loss)(jnp.full((1, 1), np.log(1.5)))
    assert (abs(gradient[0, 0]) > 0) == moves


def test_extreme_ratios_stay_finite():
    mask = jnp.ones((1, 2), bool)
    ratio = log_ratio(jnp.array([[500.0, -500.0]]), jnp.zeros((1, 2)), mask)
    loss = policy_loss(ratio, -jnp.ones((1, 2)), mask, CLIP, 2)
    assert np.isfinite(loss)
    np.testing.assert_allclose(ratio, [[20.0, -20.0]])


def test_k3_is_an_unbiased_nonnegative_kl():
    p, q = np.array([0.7, 0.2, 0.1]), np.array([0.3, 0.3, 0.4])
    k = np.log(p) - np.log(q)
    estimates = np.asarray(kl_k3(jnp.asarray(k)))
    assert (estimates >= 0).all()
    np.testing.assert_allclose((p * estimates).sum(), (p * k).sum(), rtol=1e-5)
