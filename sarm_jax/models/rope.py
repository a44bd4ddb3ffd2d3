"""Rotary position embedding, default and Llama-3 scaled.

    θ_i = base^(-2i/d),   rope(x, p) = x · cos(p θ) + rotate_half(x) · sin(p θ)

Sources: Su et al. 2104.09864; the Llama-3.1 frequency scaling as published with the model.
Frequencies below `low_freq_factor` turns per original context are divided by `factor`, frequencies
above `high_freq_factor` turns are kept, and the band between is interpolated. The layout is the
half-split one of Hugging Face checkpoints: x = [x_first_half, x_second_half].
"""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np


@dataclasses.dataclass(frozen=True)
class Llama3Scaling:
    """The `rope_type: llama3` parameters; `original_max_position_embeddings` in tokens."""

    factor: float
    low_freq_factor: float
    high_freq_factor: float
    original_max_position_embeddings: int


def inverse_frequencies(
    head_dim: int, theta: float, scaling: Llama3Scaling | None = None
) -> np.ndarray:
    """Returns θ_i in radians per position, float32 `[head_dim / 2]`."""
    inv_freq = 1.0 / theta ** (np.arange(0, head_dim, 2, dtype=np.float64) / head_dim)
    if scaling is not None:
        turns = scaling.original_max_position_embeddings * inv_freq / (2 * np.pi)
        band = scaling.high_freq_factor - scaling.low_freq_factor
        keep = np.clip((turns - scaling.low_freq_factor) / band, 0.0, 1.0)
        inv_freq = keep * inv_freq + (1.0 - keep) * inv_freq / scaling.factor
    return inv_freq.astype(np.float32)


def rope_tables(positions_bt: jax.Array, inv_freq: np.ndarray) -> tuple[jax.Array, jax.Array]:
    """Returns (cos, sin), each float32 `[B, T, head_dim / 2]`; B, T may be any leading axes."""
    angles_bth = positions_bt[..., None].astype(jnp.float32) * inv_freq
    return jnp.cos(angles_bth), jnp.sin(angles_bth)


def apply_rope(x_btnh: jax.Array, tables: tuple[jax.Array, jax.Array]) -> jax.Array:
    """Rotates every head of `[B, T, N, head_dim]` in float32; returns the dtype of x."""
    cos, sin = (table[..., None, :] for table in tables)
    first, second = jnp.split(x_btnh.astype(jnp.float32), 2, axis=-1)
    rotated = jnp.concatenate([first * cos - second * sin, second * cos + first * sin], axis=-1)
    return rotated.astype(x_btnh.dtype)
