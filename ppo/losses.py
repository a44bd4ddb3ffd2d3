"""The clipped PPO objective, token by token.

    L_π = (1/N) Σ m · max(−A ρ, −A clip(ρ, 1 − ε, 1 + ε)),   ρ = exp(log π − log π_old)
    L_V = (1/N) Σ m · ½ max((V − R)², (clip(V, V_old ± ε_v) − R)²)

N is the caller's token count: the same for every microbatch and shard of an update, so that how
the batch is cut changes nothing but the order of summation. Sources: Schulman et al. 1707.06347;
Huang et al. 2403.17031. log ρ is clamped to ±20, and masked entries are removed before the
exponential (NaN · 0 is NaN).
"""

import chex
import jax
import jax.numpy as jnp

LOG_RATIO_LIMIT = 20.0


def log_ratio(logp_bt: jax.Array, old_logp_bt: jax.Array, mask_bt: jax.Array) -> jax.Array:
    """log π − log π_old, clamped, and 0 where the mask is 0."""
    chex.assert_equal_shape([logp_bt, old_logp_bt, mask_bt])
    difference_bt = jnp.where(mask_bt, logp_bt, 0.0) - jnp.where(mask_bt, old_logp_bt, 0.0)
    return jnp.clip(difference_bt, -LOG_RATIO_LIMIT, LOG_RATIO_LIMIT)


def policy_loss(
    log_ratio_bt: jax.Array,
    advantages_bt: jax.Array,
    mask_bt: jax.Array,
    clip_range: float,
    token_count: jax.Array | float,
) -> jax.Array:
    """L_π of a `log_ratio`, a scalar."""
    ratio_bt = jnp.exp(log_ratio_bt)
    clipped_bt = jnp.clip(ratio_bt, 1 - clip_range, 1 + clip_range)
    loss_bt = jnp.maximum(-advantages_bt * ratio_bt, -advantages_bt * clipped_bt)
    return jnp.where(mask_bt, loss_bt, 0.0).sum() / token_count


def value_loss(
    values_bt: jax.Array,
    old_values_bt: jax.Array,
    returns_bt: jax.Array,
    mask_bt: jax.Array,
    clip_range: float,
    token_count: jax.Array | float,
) -> jax.Array:
    """L_V, a scalar."""
    chex.assert_equal_shape([values_bt, old_values_bt, returns_bt, mask_bt])
    values_bt, old_values_bt, returns_bt = (
        jnp.where(mask_bt, x, 0.0) for x in (values_bt, old_values_bt, returns_bt)
    )
    clipped_bt = jnp.clip(values_bt, old_values_bt - clip_range, old_values_bt + clip_range)
    worse_bt = jnp.maximum(jnp.square(values_bt - returns_bt), jnp.square(clipped_bt - returns_bt))
    return 0.5 * worse_bt.sum() / token_count


def kl_k3(log_ratio_bt: jax.Array) -> jax.Array:
    """e^{−k} − 1 + k for k = log p − log q of samples from p: the low-variance KL(p ‖ q).

    Source: Schulman, "Approximating KL divergence" (2020). Never negative.
    """
    return jnp.expm1(-log_ratio_bt) + log_ratio_bt


def response_kl(logp_br: jax.Array, ref_logp_br: jax.Array, mask_br: jax.Array) -> jax.Array:
    """KL to the reference policy, nats per response `[B]`: Σ_t k3(log π − log π_ref)."""
    log_ratio_br = log_ratio(logp_br, ref_logp_br, mask_br)
    return jnp.where(mask_br, kl_k3(log_ratio_br), 0.0).sum(axis=1)
