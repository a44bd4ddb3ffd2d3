"""The TopK sparse autoencoder of a SARM, between trunk and head, or of another reward model.

In a SARM it reads standardised states; in a reward model whose SAE came afterwards, x is h itself.

    x     = (h − mean(h)) / (std(h) + 1e-6)         per token, std with Bessel's correction
    a     = W_enc (x − b_pre) + b_latent            pre-activations
    z     = a where a is among the k largest, else 0      (no ReLU: a kept value may be negative)
    x̂     = W_dec z + b_pre
    loss  = mean((x̂ − x)²) / mean(x²)               per token: the fraction of variance unexplained

Source: SARM (arXiv 2508.08746); TopK autoencoders, Gao et al. 2406.04093.
"""

import dataclasses
from typing import Any

import jax
import jax.numpy as jnp
from flax import nnx

STANDARDISE_EPS = 1e-6


@dataclasses.dataclass(frozen=True)
class SAEConfig:
    """The SAE's sizes: `latent_size` M, `k` kept latents; without `use_topk`, z is a itself."""

    hidden_size: int
    latent_size: int
    k: int
    use_topk: bool = True


def standardise(h: jax.Array) -> jax.Array:
    """Scales to zero mean and unit standard deviation (ddof 1) over the last axis, in float32."""
    h = h.astype(jnp.float32)
    centred = h - h.mean(axis=-1, keepdims=True)
    return centred / (h.std(axis=-1, ddof=1, keepdims=True) + STANDARDISE_EPS)


def top_k(a_bf: jax.Array, k: int) -> jax.Array:
    """Keeps the k largest values of each row of `[B, M]` and sets the others to exactly 0."""
    values_bk, indices_bk = jax.lax.top_k(a_bf, k)
    rows_b1 = jnp.arange(a_bf.shape[0])[:, None]
    return jnp.zeros_like(a_bf).at[rows_b1, indices_bk].set(values_bk, unique_indices=True)


class SAE(nnx.Module):
    """The autoencoder: encoder `[D, M]`, decoder `[M, D]`, `pre_bias [D]`, `latent_bias [M]`."""

    def __init__(self, config: SAEConfig, *, dtype: Any = jnp.float32, rngs: nnx.Rngs):
        d, m = config.hidden_size, config.latent_size
        directions = jax.random.normal(rngs.params(), (m, d))
        directions /= jnp.linalg.norm(directions, axis=1, keepdims=True)
        self.config = config
        self.encoder = nnx.Param(directions.T.astype(dtype))
        self.decoder = nnx.Param(directions.astype(dtype))
        self.pre_bias = nnx.Param(jnp.zeros((d,), dtype))
        self.latent_bias = nnx.Param(jnp.zeros((m,), dtype))

    def pre_activations(self, x_bd: jax.Array) -> jax.Array:
        """Computes a `[B, M]` of inputs x `[B, D]`, in float32."""
        encoder = self.encoder[...]
        centred = (x_bd - self.pre_bias[...]).astype(encoder.dtype)
        a_bf = jnp.einsum("bd,df->bf", centred, encoder, preferred_element_type=jnp.float32)
        return a_bf + self.latent_bias[...]

    def encode(self, x_bd: jax.Array) -> jax.Array:
        """Computes z `[B, M]` of inputs x `[B, D]`, in float32."""
        a_bf = self.pre_activations(x_bd)
        return top_k(a_bf, self.config.k) if self.config.use_topk else a_bf

    def decode(self, z_bf: jax.Array) -> jax.Array:
        """Reconstructs x̂ `[B, D]` from z, in float32."""
        decoder = self.decoder[...]
        x_bd = jnp.einsum(
            "bf,fd->bd", z_bf.astype(decoder.dtype), decoder, preferred_element_type=jnp.float32
        )
        return x_bd + self.pre_bias[...]


def reconstruction_loss(x_bd: jax.Array, x_hat_bd: jax.Array) -> jax.Array:
    """Computes the normalised squared error of each token, `[B]`."""
    error_b = jnp.mean(jnp.square(x_hat_bd - x_bd), axis=-1)
    return error_b / jnp.mean(jnp.square(x_bd), axis=-1)
