"""The sparse autoencoder of a SARM, between trunk and head, or of another reward model.

In a SARM it reads standardised states; in a reward model whose SAE came afterwards, x is h itself.

    x     = (h − mean(h)) / (std(h) + 1e-6)         per token, std with Bessel's correction
    a     = W_enc (x − b_pre) + b_latent            pre-activations
    z     = activation(a)
    x̂     = W_dec z + b_pre
    loss  = mean((x̂ − x)²) / mean(x²)               per token: the fraction of variance unexplained

    activation   z
    topk         a where a is among the k largest, else 0   (a kept value may be negative)
    topk_relu    max(a, 0) where a is among the k largest, else 0
    jumprelu     a where a > max(threshold, 0), else 0, with a threshold for each latent
    relu         max(a, 0)
    identity     a

A SARM has topk or identity. Source: SARM (arXiv 2508.08746); TopK autoencoders, Gao et al.
2406.04093; JumpReLU, Rajamanoharan et al. 2407.14435.
"""

import dataclasses
from typing import Any

import jax
import jax.numpy as jnp
from flax import nnx

from sarm_jax.parallel.sharding import ONE_DEVICE, Placement

STANDARDISE_EPS = 1e-6
TOPK = ("topk", "topk_relu")
ACTIVATIONS = (*TOPK, "jumprelu", "relu", "identity")


@dataclasses.dataclass(frozen=True)
class SAEConfig:
    """The SAE's sizes and its activation.

    Attributes:
        hidden_size: D, the dimensions of x.
        latent_size: M, the number of latents.
        k: latents that TopK keeps. Without TopK, only a SARM uses it, to reconstruct.
        activation: one of `ACTIVATIONS`.
    """

    hidden_size: int
    latent_size: int
    k: int
    activation: str = "topk"

    @property
    def use_topk(self) -> bool:
        """True if at most k latents are not 0."""
        return self.activation in TOPK


def standardise(h: jax.Array) -> jax.Array:
    """Scales to zero mean and unit standard deviation (ddof 1) over the last axis, in float32."""
    h = h.astype(jnp.float32)
    centred = h - h.mean(axis=-1, keepdims=True)
    return centred / (h.std(axis=-1, ddof=1, keepdims=True) + STANDARDISE_EPS)


def top_k(a_bf: jax.Array, k: int, placement: Placement = ONE_DEVICE) -> jax.Array:
    """Keeps the k largest values of each row of `[B, M]` and sets the others to exactly 0.

    On a mesh each device does so for its own rows. Otherwise the compiler would gather them all.
    """

    def keep(a_bf):
        values_bk, indices_bk = jax.lax.top_k(a_bf, k)
        rows_b1 = jnp.arange(a_bf.shape[0])[:, None]
        return jnp.zeros_like(a_bf).at[rows_b1, indices_bk].set(values_bk, unique_indices=True)

    return placement.map_rows(keep, a_bf)


class SAE(nnx.Module):
    """The autoencoder: encoder `[D, M]`, decoder `[M, D]`, `pre_bias [D]`, `latent_bias [M]`.

    With the activation jumprelu it also has `threshold [M]`. `placement` is the mesh that shares
    the rows of large batches, those of training.
    """

    def __init__(self, config: SAEConfig, *, dtype: Any = jnp.float32, rngs: nnx.Rngs):
        d, m = config.hidden_size, config.latent_size
        directions = jax.random.normal(rngs.params(), (m, d))
        directions /= jnp.linalg.norm(directions, axis=1, keepdims=True)
        self.config, self.placement = config, ONE_DEVICE
        self.encoder = nnx.Param(directions.T.astype(dtype))
        self.decoder = nnx.Param(directions.astype(dtype))
        self.pre_bias = nnx.Param(jnp.zeros((d,), dtype))
        self.latent_bias = nnx.Param(jnp.zeros((m,), dtype))
        self.threshold: nnx.Param | None = nnx.data(None)
        if config.activation == "jumprelu":
            self.threshold = nnx.Param(jnp.zeros((m,), dtype))

    def pre_activations(self, x_bd: jax.Array) -> jax.Array:
        """Computes a `[B, M]` of inputs x `[B, D]`, in float32."""
        encoder = self.encoder[...]
        centred = (x_bd - self.pre_bias[...]).astype(encoder.dtype)
        a_bf = jnp.einsum("bd,df->bf", centred, encoder, preferred_element_type=jnp.float32)
        return a_bf + self.latent_bias[...]

    def encode(self, x_bd: jax.Array) -> jax.Array:
        """Computes z `[B, M]` of inputs x `[B, D]`, in float32."""
        return self.activate(self.pre_activations(x_bd))

    def activate(self, a_bf: jax.Array) -> jax.Array:
        """Computes z `[B, M]` of pre-activations."""
        if self.config.use_topk:
            a_bf = top_k(a_bf, self.config.k, self.placement)
        return _rectified(a_bf, self.config.activation, self._threshold())

    def reconstructing(self, a_bf: jax.Array) -> jax.Array:
        """Computes the latents `[B, M]` that reconstruct x: z, or the k largest a for identity."""
        identity = self.config.activation == "identity"
        if identity:
            return top_k(a_bf, self.config.k, self.placement)
        return self.activate(a_bf)

    def columns(self, x_nd: jax.Array, index_f: jax.Array) -> jax.Array:
        """Computes the latents `[N, f]` of the features `index_f`; the SAE must have no TopK."""
        encoder = self.encoder[...][:, index_f]
        centred = (x_nd - self.pre_bias[...]).astype(encoder.dtype)
        a_nf = jnp.einsum("nd,df->nf", centred, encoder, preferred_element_type=jnp.float32)
        a_nf = a_nf + self.latent_bias[...][index_f]
        return _rectified(a_nf, self.config.activation, self._threshold(index_f))

    def _threshold(self, index_f: Any = slice(None)) -> jax.Array | None:
        return None if self.threshold is None else self.threshold[...][index_f]

    def decode(self, z_bf: jax.Array) -> jax.Array:
        """Reconstructs x̂ `[B, D]` from z, in float32."""
        decoder = self.decoder[...]
        x_bd = jnp.einsum(
            "bf,fd->bd", z_bf.astype(decoder.dtype), decoder, preferred_element_type=jnp.float32
        )
        return x_bd + self.pre_bias[...]


def _rectified(a_bf: jax.Array, activation: str, threshold_f: jax.Array | None) -> jax.Array:
    """Applies the ReLU of an activation that has one, with its thresholds."""
    if activation in ("topk", "identity"):
        return a_bf
    if threshold_f is None:
        return jax.nn.relu(a_bf)
    return jnp.where(a_bf > jnp.maximum(threshold_f, 0), a_bf, 0)


def reconstruction_loss(x_bd: jax.Array, x_hat_bd: jax.Array) -> jax.Array:
    """Computes the normalised squared error of each token, `[B]`."""
    error_b = jnp.mean(jnp.square(x_hat_bd - x_bd), axis=-1)
    return error_b / jnp.mean(jnp.square(x_bd), axis=-1)
