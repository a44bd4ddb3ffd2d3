"""log π of given tokens, without ever holding `[B, R, V]` when chunked.

The vocabulary projection is the largest array of an update (128 257 columns for Llama-3.1).
With `chunk` > 0, positions are processed `chunk` at a time and recomputed in the backward pass.
"""

import jax
import jax.numpy as jnp

from sarm_jax.models.llama import mask_padding, to_logits


def token_logprobs(
    x_brd: jax.Array,
    vocabulary_vd: jax.Array,
    targets_br: jax.Array,
    temperature: float,
    chunk: int = 0,
    vocab_size: int | None = None,
) -> tuple[jax.Array, jax.Array]:
    """(log π(target), entropy of π), each float32 `[B, R]`, for π = softmax(x Eᵀ / temperature).

    The entropy is a metric and carries no gradient. Rows of E from `vocab_size` on (None: all are
    tokens) have no part in the softmax.
    """
    vocab_size = len(vocabulary_vd) if vocab_size is None else vocab_size

    def project(x_bcd, targets_bc):
        logits_bcv = mask_padding(to_logits(x_bcd, vocabulary_vd), vocab_size) / temperature
        logits_bcv -= jax.lax.stop_gradient(logits_bcv.max(axis=-1, keepdims=True))
        weight_bcv = jnp.exp(logits_bcv)
        z_bc = weight_bcv.sum(axis=-1)
        chosen_bc = jnp.take_along_axis(logits_bcv, targets_bc[..., None], axis=-1)[..., 0]
        # H = log z − Σ p · logit, on the exponentials that log z needs anyway.
        entropy_bc = jnp.log(z_bc) - (weight_bcv * logits_bcv).sum(axis=-1) / z_bc
        return chosen_bc - jnp.log(z_bc), jax.lax.stop_gradient(entropy_bc)

    batch, length, _ = x_brd.shape
    if not 0 < chunk < length:
        return project(x_brd, targets_br)
    count = -(-length // chunk)
    extra = count * chunk - length
    x_brd = jnp.pad(x_brd, ((0, 0), (0, extra), (0, 0)))
    targets_br = jnp.pad(targets_br, ((0, 0), (0, extra)))
    pieces = (
        x_brd.reshape(batch, count, chunk, -1).swapaxes(0, 1),
        targets_br.reshape(batch, count, chunk).swapaxes(0, 1),
    )
    outputs = jax.lax.map(jax.checkpoint(lambda piece: project(*piece)), pieces)
    logp_br, entropy_br = (y.swapaxes(0, 1).reshape(batch, -1)[:, :length] for y in outputs)
    return logp_br, entropy_br
