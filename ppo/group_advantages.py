"""Advantages of responses within the group of k responses to the same prompt.

    RLOO      A_i = R_i − mean of the other k − 1 rewards       Ahmadian et al. 2402.14740
    GRPO      A_i = (R_i − mean) / (σ + 1e-4)                   Shao et al. 2402.03300
    Dr. GRPO  A_i = R_i − mean                                  Liu et al. 2503.20783

σ is the standard deviation of the group's k rewards, with k − 1 in the denominator. The k responses
to a prompt are neighbours in a batch. Arrays are float32 `[B]`.

If some responses are screened, k is the number of the others in the group, and the mean and σ are
theirs; the advantage of a screened response is 0. A response that is the only one left in its group
has nothing to be compared with, and the advantage 0.
"""

from typing import Any

import jax
import jax.numpy as jnp

STD_FLOOR = 1e-4  # added to σ
NO_SPREAD = 1e-6  # range of a group's rewards, relative to the largest of them


def leave_one_out(reward_b: jax.Array, k: int, keep_b: Any = None) -> jax.Array:
    """Returns each reward minus the mean of the other k − 1 rewards of its group.

    `keep_b` is False for screened responses; None: none is.
    """
    if keep_b is None:
        centred_gk = _centred(reward_b.reshape(-1, k))
        return (centred_gk * (k / (k - 1))).reshape(-1)
    centred_gk, kept_g1 = _centred_kept(reward_b.reshape(-1, k), keep_b.reshape(-1, k))
    return (centred_gk * (kept_g1 / jnp.maximum(kept_g1 - 1, 1))).reshape(-1)


def group_normalised(reward_b: jax.Array, k: int, scale: bool, keep_b: Any = None) -> jax.Array:
    """Returns each reward minus the mean of its group.

    Args:
        reward_b: the rewards.
        k: responses per prompt.
        scale: also divide by σ + 1e-4.
        keep_b: False for screened responses; None: none is.
    """
    others: Any = k - 1
    if keep_b is None:
        centred_gk = _centred(reward_b.reshape(-1, k))
    else:
        centred_gk, kept_g1 = _centred_kept(reward_b.reshape(-1, k), keep_b.reshape(-1, k))
        others = jnp.maximum(kept_g1 - 1, 1)
    if scale:
        std_g1 = jnp.sqrt(jnp.square(centred_gk).sum(axis=1, keepdims=True) / others)
        centred_gk = centred_gk / (std_g1 + STD_FLOOR)
    return centred_gk.reshape(-1)


def has_no_spread(reward_gk: jax.Array, keep_gk: Any = None) -> jax.Array:
    """Returns True for groups whose rewards are equal up to rounding, `[G]`; NaN has a spread.

    Rewards of screened responses do not count. A group without others has no spread.
    """
    if keep_gk is None:
        spread_g = reward_gk.max(axis=1) - reward_gk.min(axis=1)
        return spread_g <= NO_SPREAD * jnp.abs(reward_gk).max(axis=1)
    highest_g = reward_gk.max(axis=1, where=keep_gk, initial=-jnp.inf)
    lowest_g = reward_gk.min(axis=1, where=keep_gk, initial=jnp.inf)
    largest_g = jnp.abs(reward_gk).max(axis=1, where=keep_gk, initial=0.0)
    return highest_g - lowest_g <= NO_SPREAD * largest_g


def _centred(reward_gk: jax.Array) -> jax.Array:
    """Returns the rewards minus the mean of their group; exactly 0 in a group without spread."""
    centred_gk = reward_gk - reward_gk.mean(axis=1, keepdims=True)
    return jnp.where(has_no_spread(reward_gk)[:, None], 0.0, centred_gk)


def _centred_kept(reward_gk: jax.Array, keep_gk: jax.Array) -> tuple[jax.Array, jax.Array]:
    """Returns rewards minus the mean of those that are kept, 0 for others, and their number."""
    kept_g1 = keep_gk.sum(axis=1, keepdims=True)
    sum_g1 = jnp.where(keep_gk, reward_gk, 0.0).sum(axis=1, keepdims=True)
    centred_gk = reward_gk - sum_g1 / jnp.maximum(kept_g1, 1)
    learns_gk = keep_gk & ~has_no_spread(reward_gk, keep_gk)[:, None]
    return jnp.where(learns_gk, centred_gk, 0.0), kept_g1
