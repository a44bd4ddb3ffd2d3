"""Log-probabilities and entropy of given tokens, in chunks that bound the memory.

The vocabulary projection `[B, R, V]` is the largest array of an update (V = 128 257 for Llama-3.1).
With `chunk` > 0 it is never held as a whole: `chunk` positions are processed at a time, and are
computed again in the backward pass.
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
    """Returns (log π(target), entropy of π), each float32 `[B, R]`, for π = softmax(x Eᵀ / T).

    The entropy is a metric and has no gradient.

    Args:
        x_brd: the hidden states that predict the tokens.
        vocabulary_vd: E, the output embedding.
        targets_br: the tokens.
        temperature: T.
        chunk: positions per vocabulary projection; 0: all at once.
        vocab_size: number of tokens; later rows of E are padding. None: all rows are tokens.
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
