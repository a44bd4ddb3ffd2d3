"""Turns one reward per response into one advantage per token.

    r_t = −c · (log π_old − log π_ref)_t + 1[t = T] R        c: kl_coef, T: last token of the mask
    δ_t = r_t + γ V_{t+1} − V_t,   A_t = δ_t + γ λ A_{t+1},   V = 0 past T
    returns = A + V                                           before whitening

Sources: Schulman et al. 1506.02438 (GAE); Huang et al. 2403.17031 (the RLHF details).
Arrays are float32 `[B, R]` over response tokens. Entries outside the mask do not affect the
results, even if they are NaN.
"""

import chex
import jax
import jax.numpy as jnp

from sarm_jax.reporting.spread import ROUNDING


def token_rewards(
    reward_b: jax.Array, kl_br: jax.Array, mask_br: jax.Array, kl_coef: float
) -> jax.Array:
    """Returns r_t: the KL penalty of each token, plus the response's reward on its last token.

    Args:
        reward_b: reward of each response.
        kl_br: log π_old − log π_ref of each token.
        mask_br: marks the tokens of the responses.
        kl_coef: c, the weight of the KL penalty.
    """
    chex.assert_rank([reward_b, kl_br, mask_br], [1, 2, 2])
    mask_br = mask_br.astype(bool)
    is_last_br = mask_br & ~jnp.pad(mask_br[:, 1:], ((0, 0), (0, 1)))
    penalty_br = jnp.where(mask_br, kl_coef * kl_br, 0.0)
    return jnp.where(is_last_br, reward_b[:, None], 0.0) - penalty_br


def gae(
    rewards_br: jax.Array, values_br: jax.Array, mask_br: jax.Array, gamma: float, lam: float
) -> tuple[jax.Array, jax.Array]:
    """Returns (A, returns); both are 0 outside the mask.

    V after the last token is 0 even if the response was cut off by the token limit.
    """
    chex.assert_equal_shape([rewards_br, values_br, mask_br])
    mask_br = mask_br.astype(bool)
    rewards_br = jnp.where(mask_br, rewards_br, 0.0)
    values_br = jnp.where(mask_br, values_br, 0.0)
    next_values_br = jnp.pad(values_br[:, 1:], ((0, 0), (0, 1)))
    deltas_br = rewards_br + gamma * next_values_br - values_br

    def step(advantage_b, delta_b):
        advantage_b = delta_b + gamma * lam * advantage_b
        return advantage_b, advantage_b

    _, advantages_rb = jax.lax.scan(
        step, jnp.zeros_like(deltas_br[:, 0]), deltas_br.T, reverse=True
    )
    advantages_br = jnp.where(mask_br, advantages_rb.T, 0.0)
    return advantages_br, advantages_br + values_br


def masked_mean(x_br: jax.Array, mask_br: jax.Array) -> jax.Array:
    """Returns the mean of x over the mask."""
    return jnp.where(mask_br, x_br, 0.0).sum() / mask_br.sum()


def whiten(x_br: jax.Array, mask_br: jax.Array) -> jax.Array:
    """Returns (x − μ) / √(σ² + 1e-8), with μ and σ over the mask of the whole batch; 0 outside.

    If all x are equal up to rounding, the result is 0.
    """
    mean = masked_mean(x_br, mask_br)
    variance = masked_mean(jnp.square(x_br - mean), mask_br)
    low, high = x_br.min(where=mask_br, initial=jnp.inf), x_br.max(where=mask_br, initial=-jnp.inf)
    constant = high - low <= ROUNDING * jnp.maximum(-low, high)
    whitened_br = (x_br - mean) * jax.lax.rsqrt(variance + 1e-8)
    return jnp.where(mask_br & ~constant, whitened_br, 0.0)
