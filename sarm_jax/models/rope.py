"""Rotary position embedding, default and scaled.

    θ_i = base^(-2i/d),   rope(x, p) = m · (x · cos(p θ) + rotate_half(x) · sin(p θ))

m is 1 but for YaRN. Each kind of scaling changes θ:

    linear    θ / factor: positions are interpolated
    dynamic   θ itself up to `max_position_embeddings` tokens, the longest sequence that runs here
    llama3    θ / factor below `low_freq_factor` turns per original context, θ above
              `high_freq_factor` turns, and the band between interpolated
    yarn      θ / factor below `beta_slow` turns per original context, θ above `beta_fast` turns,
              and a linear ramp over i between

Sources: Su et al. 2104.09864; Peng et al. 2309.00071 (YaRN); the Llama-3.1 frequency scaling as
published with the model; transformers, modeling_rope_utils.py, for the names of the fields. The
layout is the half-split one of Hugging Face checkpoints: x = [x_first_half, x_second_half].
"""

import dataclasses
import math
from typing import ClassVar

import jax
import jax.numpy as jnp
import numpy as np


@dataclasses.dataclass(frozen=True)
class LinearScaling:
    """The `rope_type: linear` parameters."""

    rope_type: ClassVar[str] = "linear"
    factor: float


@dataclasses.dataclass(frozen=True)
class DynamicScaling:
    """The `rope_type: dynamic` parameters, which matter only beyond the positions of a model."""

    rope_type: ClassVar[str] = "dynamic"
    factor: float


@dataclasses.dataclass(frozen=True)
class Llama3Scaling:
    """The `rope_type: llama3` parameters; `original_max_position_embeddings` in tokens."""

    rope_type: ClassVar[str] = "llama3"
    factor: float
    low_freq_factor: float
    high_freq_factor: float
    original_max_position_embeddings: int


@dataclasses.dataclass(frozen=True)
class YarnScaling:
    """The `rope_type: yarn` parameters; `original_max_position_embeddings` in tokens.

    `attention_factor` is m, by default 0.1 ln(factor) + 1. With `truncate` the ends of the ramp are
    rounded to whole i.
    """

    rope_type: ClassVar[str] = "yarn"
    factor: float
    original_max_position_embeddings: int
    attention_factor: float | None = None
    beta_fast: float = 32.0
    beta_slow: float = 1.0
    truncate: bool = True

    @property
    def magnitude(self) -> float:
        """The factor m of queries and keys."""
        if self.attention_factor is not None:
            return self.attention_factor
        return 0.1 * math.log(self.factor) + 1.0 if self.factor > 1 else 1.0

    def interpolated(self, head_dim: int, theta: float) -> np.ndarray:
        """Returns the share of θ / factor in each frequency, `[head_dim / 2]`."""

        def index(turns: float) -> float:
            """Returns the i whose frequency turns so often in the original context."""
            period = self.original_max_position_embeddings / (turns * 2 * math.pi)
            return head_dim * math.log(period) / (2 * math.log(theta))

        low, high = index(self.beta_fast), index(self.beta_slow)
        if self.truncate:
            low, high = math.floor(low), math.ceil(high)
        low, high = max(low, 0), min(high, head_dim - 1)
        width = high - low or 0.001
        return np.clip((np.arange(head_dim // 2) - low) / width, 0.0, 1.0)


RopeScaling = LinearScaling | DynamicScaling | Llama3Scaling | YarnScaling
SCALINGS: dict[str, type[RopeScaling]] = {
    scaling.rope_type: scaling
    for scaling in (LinearScaling, DynamicScaling, Llama3Scaling, YarnScaling)
}


def inverse_frequencies(
    head_dim: int, theta: float, scaling: RopeScaling | None = None
) -> np.ndarray:
    """Returns θ_i in radians per position, float32 `[head_dim / 2]`."""
    inv_freq = 1.0 / theta ** (np.arange(0, head_dim, 2, dtype=np.float64) / head_dim)
    if isinstance(scaling, LinearScaling):
        inv_freq = inv_freq / scaling.factor
    if isinstance(scaling, Llama3Scaling):
        turns = scaling.original_max_position_embeddings * inv_freq / (2 * np.pi)
        band = scaling.high_freq_factor - scaling.low_freq_factor
        keep = np.clip((turns - scaling.low_freq_factor) / band, 0.0, 1.0)
        inv_freq = keep * inv_freq + (1.0 - keep) * inv_freq / scaling.factor
    if isinstance(scaling, YarnScaling):
        share = scaling.interpolated(head_dim, theta)
        inv_freq = (1.0 - share) * inv_freq + share * inv_freq / scaling.factor
    return inv_freq.astype(np.float32)


def rope_tables(
    positions_bt: jax.Array, inv_freq: np.ndarray, magnitude: float = 1.0
) -> tuple[jax.Array, jax.Array]:
    """Returns m · (cos, sin), each float32 `[B, T, head_dim / 2]`; B, T may be any leading axes."""
    angles_bth = positions_bt[..., None].astype(jnp.float32) * inv_freq
    cos, sin = jnp.cos(angles_bth), jnp.sin(angles_bth)
    return (cos, sin) if magnitude == 1.0 else (magnitude * cos, magnitude * sin)


def apply_rope(x_btnh: jax.Array, tables: tuple[jax.Array, jax.Array]) -> jax.Array:
    """Rotates every head of `[B, T, N, head_dim]` in float32; returns the dtype of x."""
    cos, sin = (table[..., None, :] for table in tables)
    first, second = jnp.split(x_btnh.astype(jnp.float32), 2, axis=-1)
    rotated = jnp.concatenate([first * cos - second * sin, second * cos + first * sin], axis=-1)
    return rotated.astype(x_btnh.dtype)
