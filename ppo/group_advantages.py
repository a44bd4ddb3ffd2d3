"""Advantages of responses within the group of k responses to the same prompt.

    RLOO      A_i = R_i − mean of the other k − 1 rewards       Ahmadian et al. 2402.14740
    GRPO      A_i = (R_i − mean) / (σ + 1e-4)                   Shao et al. 2402.03300
    Dr. GRPO  A_i = R_i − mean                                  Liu et al. 2503.20783

σ is the standard deviation of the group's k rewards, with k − 1 in the denominator. The k responses
to a prompt are neighbours in a batch. Arrays are float32 `[B]`.
"""

import jax
import jax.numpy as jnp

STD_FLOOR = 1e-4  # added to σ
NO_SPREAD = 1e-6  # range of a group's rewards, relative to the largest of them


def leave_one_out(reward_b: jax.Array, k: int) -> jax.Array:
    """Returns each reward minus the mean of the other k − 1 rewards of its group."""
    centred_gk = _centred(reward_b.reshape(-1, k))
    return (centred_gk * (k / (k - 1))).reshape(-1)


def group_normalised(reward_b: jax.Array, k: int, scale: bool) -> jax.Array:
    """Returns each reward minus the mean of its group.

    Args:
        reward_b: the rewards.
        k: responses per prompt.
        scale: also divide by σ + 1e-4.
    """
    centred_gk = _centred(reward_b.reshape(-1, k))
    if scale:
        std_g1 = jnp.sqrt(jnp.square(centred_gk).sum(axis=1, keepdims=True) / (k - 1))
        centred_gk = centred_gk / (std_g1 + STD_FLOOR)
    return centred_gk.reshape(-1)


def has_no_spread(reward_gk: jax.Array) -> jax.Array:
    """Returns True for groups whose rewards are equal up to rounding, `[G]`; NaN has a spread."""
    spread_g = reward_gk.max(axis=1) - reward_gk.min(axis=1)
    return spread_g <= NO_SPREAD * jnp.abs(reward_gk).max(axis=1)


def _centred(reward_gk: jax.Array) -> jax.Array:
    """Returns the rewards minus the mean of their group; exactly 0 in a group without spread."""
    centred_gk = reward_gk - reward_gk.mean(axis=1, keepdims=True)
    return jnp.where(has_no_spread(reward_gk)[:, None], 0.0, centred_gk)
