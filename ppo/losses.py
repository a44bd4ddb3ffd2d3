"""The clipped PPO objective, token by token, and its form with one ratio per response.

    L_π = (1/N) Σ m · max(−A ρ, −A clip(ρ, 1 − ε, 1 + ε_high)),   ρ = exp(log π − log π_old)
    L_V = (1/N) Σ m · ½ max((V − R)², (clip(V, V_old ± ε_v) − R)²)

m is the mask of the response tokens, R the returns. N is a token count that the caller gives: it is
the same for every microbatch and shard of an update, so that cutting the batch changes nothing but
the order of summation. ε_high is ε unless it is given (DAPO: Yu et al. 2503.14476). With one ratio
per response, log ρ is the sum over its tokens. log ρ is clamped to ±20. Entries outside the mask
are replaced before the exponential, because NaN · 0 is NaN.

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


def response_log_ratio(logp_br: jax.Array, old_logp_br: jax.Array, mask_br: jax.Array) -> jax.Array:
    """Returns log ρ of each whole response `[B]`, clamped."""
    chex.assert_equal_shape([logp_br, old_logp_br, mask_br])
    difference_br = jnp.where(mask_br, logp_br, 0.0) - jnp.where(mask_br, old_logp_br, 0.0)
    return jnp.clip(difference_br.sum(axis=1), -LOG_RATIO_LIMIT, LOG_RATIO_LIMIT)


def clipped_loss(
    log_ratio: jax.Array, advantages: jax.Array, clip: tuple[float, float]
) -> jax.Array:
    """Returns max(−A ρ, −A clip(ρ, 1 − ε, 1 + ε_high)) of each token or response.

    Args:
        log_ratio: log ρ, of any shape.
        advantages: A, of a shape that broadcasts to it.
        clip: (ε, ε_high).
    """
    ratio = jnp.exp(log_ratio)
    clipped = jnp.clip(ratio, 1 - clip[0], 1 + clip[1])
    return jnp.maximum(-advantages * ratio, -advantages * clipped)


def beyond_clip(log_ratio: jax.Array, clip: tuple[float, float]) -> jax.Array:
    """Returns True where the ratio is below 1 − ε or above 1 + ε_high; `clip` is (ε, ε_high)."""
    ratio = jnp.exp(log_ratio)
    return jnp.abs(ratio - 1) > jnp.where(ratio > 1, clip[1], clip[0])


def policy_loss(
    log_ratio_br: jax.Array,
    advantages_br: jax.Array,
    mask_br: jax.Array,
    clip: tuple[float, float],
    token_count: jax.Array | float,
) -> jax.Array:
    """Returns L_π, a scalar.

    Args:
        log_ratio_br: log ρ, from `log_ratio`.
        advantages_br: A of each token.
        mask_br: marks the tokens of the responses.
        clip: (ε, ε_high).
        token_count: N.
    """
    loss_br = clipped_loss(log_ratio_br, advantages_br, clip)
    return jnp.where(mask_br, loss_br, 0.0).sum() / token_count


def average(
    loss_br: jax.Array,
    mask_br: jax.Array,
    *,
    over: str,
    rows: int,
    tokens: jax.Array | float,
    max_tokens: int,
) -> jax.Array:
    """Returns the share of a microbatch in the average loss of its minibatch, a scalar.

    Args:
        loss_br: loss of each token.
        mask_br: marks the tokens of the responses.
        over: "responses": the mean over the tokens of each response, then over the responses (GRPO,
            2402.03300); "tokens": the mean over all tokens (DAPO, 2503.14476); "constant": the sum
            over the tokens, divided by `max_tokens`, then the mean over the responses (Dr. GRPO,
            2503.20783).
        rows: responses in the minibatch.
        tokens: response tokens in the minibatch.
        max_tokens: the longest response, in tokens.
    """
    loss_br = jnp.where(mask_br, loss_br, 0.0)
    if over == "tokens":
        return loss_br.sum() / tokens
    if over == "constant":
        return loss_br.sum() / (rows * max_tokens)
    return (loss_br.sum(axis=1) / mask_br.sum(axis=1)).sum() / rows


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
