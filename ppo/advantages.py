"""From one reward per response to one advantage per token.

    r_t = −c · (log π_old − log π_ref)_t + 1[t = T] R        c: kl_coef, T: last token of the mask
    δ_t = r_t + γ V_{t+1} − V_t,   A_t = δ_t + γ λ A_{t+1},   V = 0 past T
    returns = A + V                                           before whitening

Sources: Schulman et al. 1506.02438 (GAE); Huang et al. 2403.17031 (the RLHF details).
Everything is float32 `[B, R]` over response tokens, and whatever stands where the mask is 0,
NaN included, changes nothing.
"""

import chex
import jax
import jax.numpy as jnp


def token_rewards(
    reward_b: jax.Array, kl_bt: jax.Array, mask_bt: jax.Array, kl_coef: float
) -> jax.Array:
    """The per-token KL penalty, plus the response's reward on its last token."""
    chex.assert_rank([reward_b, kl_bt, mask_bt], [1, 2, 2])
    mask_bt = mask_bt.astype(bool)
    is_last_bt = mask_bt & ~jnp.pad(mask_bt[:, 1:], ((0, 0), (0, 1)))
    penalty_bt = jnp.where(mask_bt, kl_coef * kl_bt, 0.0)
    return jnp.where(is_last_bt, reward_b[:, None], 0.0) - penalty_bt


def gae(
    rewards_bt: jax.Array, values_bt: jax.Array, mask_bt: jax.Array, gamma: float, lam: float
) -> tuple[jax.Array, jax.Array]:
    """(advantages, returns); a response that ran out of budget is not bootstrapped."""
    chex.assert_equal_shape([rewards_bt, values_bt, mask_bt])
    mask_bt = mask_bt.astype(bool)
    rewards_bt = jnp.where(mask_bt, rewards_bt, 0.0)
    values_bt = jnp.where(mask_bt, values_bt, 0.0)
    next_values_bt = jnp.pad(values_bt[:, 1:], ((0, 0), (0, 1)))
    deltas_bt = rewards_bt + gamma * next_values_bt - values_bt

    def step(advantage_b, delta_b):
        advantage_b = delta_b + gamma * lam * advantage_b
        return advantage_b, advantage_b

    _, advantages_tb = jax.lax.scan(
        step, jnp.zeros_like(deltas_bt[:, 0]), deltas_bt.T, reverse=True
    )
    advantages_bt = jnp.where(mask_bt, advantages_tb.T, 0.0)
    return advantages_bt, advantages_bt + values_bt


def masked_mean(x_bt: jax.Array, mask_bt: jax.Array) -> jax.Array:
    """Mean of x where the mask is 1."""
    return jnp.where(mask_bt, x_bt, 0.0).sum() / mask_bt.sum()


def whiten(x_bt: jax.Array, mask_bt: jax.Array) -> jax.Array:
    """(x − μ) / √(σ² + 1e-8) with the mask's own μ and σ over the whole batch; 0 elsewhere."""
    mean = masked_mean(x_bt, mask_bt)
    variance = masked_mean(jnp.square(x_bt - mean), mask_bt)
    return jnp.where(mask_bt, (x_bt - mean) * jax.lax.rsqrt(variance + 1e-8), 0.0)
