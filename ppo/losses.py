"""The clipped PPO objective, token by token.

    L_π = (1/N) Σ m · max(−A ρ, −A clip(ρ, 1 − ε, 1 + ε)),   ρ = exp(log π − log π_old)
    L_V = (1/N) Σ m · ½ max((V − R)², (clip(V, V_old ± ε_v) − R)²)

m is the mask of the response tokens, R the returns. N is a token count that the caller gives: it is
the same for every microbatch and shard of an update, so that cutting the batch changes nothing but
the order of summation. log ρ is clamped to ±20. Entries outside the mask are replaced before the
exponential, because NaN · 0 is NaN.

Sources: Schulman et al. 1707.06347; Huang et al. 2403.17031. Arrays are `[B, R]` over response
tokens.
"""

import chex
import jax
import jax.numpy as jnp

LOG_RATIO_LIMIT = 20.0


def log_ratio(logp_br: jax.Array, old_logp_br: jax.Array, mask_br: jax.Array) -> jax.Array:
    """Returns log ρ = log π − log π_old, clamped; 0 outside the mask."""
    chex.assert_equal_shape([logp_br, old_logp_br, mask_br])
    difference_br = jnp.where(mask_br, logp_br, 0.0) - jnp.where(mask_br, old_logp_br, 0.0)
    return jnp.clip(difference_br, -LOG_RATIO_LIMIT, LOG_RATIO_LIMIT)


def policy_loss(
    log_ratio_br: jax.Array,
    advantages_br: jax.Array,
    mask_br: jax.Array,
    clip_range: float,
    token_count: jax.Array | float,
) -> jax.Array:
    """Returns L_π, a scalar.

    Args:
        log_ratio_br: log ρ, from `log_ratio`.
        advantages_br: A of each token.
        mask_br: marks the tokens of the responses.
        clip_range: ε.
        token_count: N.
    """
    ratio_br = jnp.exp(log_ratio_br)
    clipped_br = jnp.clip(ratio_br, 1 - clip_range, 1 + clip_range)
    loss_br = jnp.maximum(-advantages_br * ratio_br, -advantages_br * clipped_br)
    return jnp.where(mask_br, loss_br, 0.0).sum() / token_count


def value_loss(
    values_br: jax.Array,
    old_values_br: jax.Array,
    returns_br: jax.Array,
    mask_br: jax.Array,
    clip_range: float,
    token_count: jax.Array | float,
) -> jax.Array:
    """Returns L_V, a scalar.

    Args:
        values_br: V.
        old_values_br: V_old.
        returns_br: R.
        mask_br: marks the tokens of the responses.
        clip_range: ε_v.
        token_count: N.
    """
    chex.assert_equal_shape([values_br, old_values_br, returns_br, mask_br])
    values_br, old_values_br, returns_br = (
        jnp.where(mask_br, x, 0.0) for x in (values_br, old_values_br, returns_br)
    )
    clipped_br = jnp.clip(values_br, old_values_br - clip_range, old_values_br + clip_range)
    worse_br = jnp.maximum(jnp.square(values_br - returns_br), jnp.square(clipped_br - returns_br))
    return 0.5 * worse_br.sum() / token_count


def kl_k3(log_ratio_br: jax.Array) -> jax.Array:
    """Returns e^{−k} − 1 + k for k = log p − log q of samples from p.

    Its mean estimates KL(p ‖ q) with a low variance, and it is never negative. Source: Schulman,
    "Approximating KL divergence" (2020).
    """
    return jnp.expm1(-log_ratio_br) + log_ratio_br


def response_kl(logp_br: jax.Array, ref_logp_br: jax.Array, mask_br: jax.Array) -> jax.Array:
    """Returns the KL to the reference policy, Σ_t k3(log π − log π_ref), in nats `[B]`."""
    log_ratio_br = log_ratio(logp_br, ref_logp_br, mask_br)
    return jnp.where(mask_br, kl_k3(log_ratio_br), 0.0).sum(axis=1)
