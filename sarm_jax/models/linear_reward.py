"""A reward model with a linear head on its last state, and with features if it has an SAE.

    h = trunk(tokens) at the last token that is no padding;   R = w · h
    h = W_dec z + b_pre + e,   z = SAE(h)
    R = Σ_i z_i (W_dec,i · w)  +  e · w  +  b_pre · w

Such a model is a sequence classifier with one label. The trunk is a whole decoder with its final
norm. Unlike a SARM, the model was not trained through
z. The last line is an identity for any SAE: what the features leave out is in the error term e · w.
R is always computed from h, and an intervention z → z' adds Σ_i (z'_i − z_i)(W_dec,i · w). So the
score without an intervention does not depend on the SAE.

Pooling is that of the class `GenericForSequenceClassification` in transformers: the last token
that is not the padding token of config.json. A model without a padding token reads the last token.
"""

import dataclasses
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx

from sarm_jax.models.llama import Llama, LlamaConfig
from sarm_jax.models.sae import SAE, SAEConfig
from sarm_jax.models.sarm import Intervention, check_inputs, last_position
from sarm_jax.parallel.processes import fetch

HIGHEST = jax.lax.Precision.HIGHEST


@dataclasses.dataclass(frozen=True)
class LinearRewardConfig:
    """The architecture: `trunk` is the whole decoder, and `sae` None if there are no features.

    `pad_token_id` is that of config.json, by which transformers finds the token to pool.
    """

    trunk: LlamaConfig
    pad_token_id: int | None = None
    sae: SAEConfig | None = None

    @property
    def latent_size(self) -> int:
        """The number of features, 0 without an SAE."""
        return 0 if self.sae is None else self.sae.latent_size


class LinearReward(nnx.Module):
    """The reward model: `trunk`, the head weights `score [D]`, and `sae` or None."""

    def __init__(self, config: LinearRewardConfig, *, dtype: Any = jnp.float32, rngs: nnx.Rngs):
        self.config = config
        self.trunk = Llama(config.trunk, dtype=dtype, rngs=rngs, head=False)
        self.score = nnx.Param(jnp.zeros((config.trunk.hidden_size,), dtype))
        self.sae: SAE | None = nnx.data(None)
        if config.sae is not None:
            self.sae = SAE(config.sae, dtype=dtype, rngs=rngs)

    def __call__(
        self, tokens_bt: jax.Array, mask_bt: jax.Array, change: Intervention | None = None
    ) -> tuple[jax.Array, jax.Array | None]:
        """Returns (scores `[B]` under the change, the latents `[B, M]` before it, if any).

        Raises:
            InputError: a shape, a dtype, a token id, a length or the change is wrong.
        """
        check_inputs(self.config, tokens_bt, mask_bt, change)
        h_bd = self.pooled(tokens_bt, mask_bt)
        z_bf = None if self.sae is None else self.sae.encode(h_bd)
        return self.reward(h_bd, z_bf, change), z_bf

    def pooled(self, tokens_bt: jax.Array, mask_bt: jax.Array) -> jax.Array:
        """Returns the state after the final norm that the head reads, float32 `[B, D]`."""
        h_btd = self.trunk.hidden(tokens_bt, mask_bt)
        position_b = pooled_position(tokens_bt, mask_bt, self.config.pad_token_id)
        return h_btd[jnp.arange(h_btd.shape[0]), position_b].astype(jnp.float32)

    def reward(
        self, h_bd: jax.Array, z_bf: jax.Array | None, change: Intervention | None = None
    ) -> jax.Array:
        """Computes the rewards `[B]` of pooled states in full float32, on GPUs too."""
        weights_d = self.score[...].astype(jnp.float32)
        # The barrier keeps the product the same program, whatever else reads h.
        h_bd = jax.lax.optimization_barrier(h_bd)
        reward_b = jnp.dot(h_bd, weights_d, precision=HIGHEST)
        if change is None or z_bf is None or self.sae is None:
            return reward_b
        decoder_sd = self.sae.decoder[...][change.indices].astype(jnp.float32)
        weight_s = jnp.dot(decoder_sd, weights_d, precision=HIGHEST)
        delta_bs = (change(z_bf) - z_bf)[:, change.indices]
        return reward_b + jnp.dot(delta_bs, weight_s, precision=HIGHEST)

    def feature_weights(self) -> np.ndarray:
        """Returns what a unit of every latent adds to the reward, W_dec w, float32 `[M]`."""
        assert self.sae is not None
        decoder_fd, weights_d = (p[...].astype(jnp.float32) for p in (self.sae.decoder, self.score))
        return np.asarray(fetch(jnp.dot(decoder_fd, weights_d, precision=HIGHEST)))

    def constant(self) -> float:
        """Returns b_pre · w, which the SAE's bias adds to the reward of every response."""
        assert self.sae is not None
        bias_d, weights_d = (
            np.asarray(fetch(p[...]), np.float64) for p in (self.sae.pre_bias, self.score)
        )
        return float(bias_d @ weights_d)


def pooled_position(
    tokens_bt: jax.Array, mask_bt: jax.Array, pad_token_id: int | None
) -> jax.Array:
    """Returns the index `[B]` of the last real token that is not `pad_token_id`.

    A row of nothing else is read at its first position, as in transformers.
    """
    if pad_token_id is None:
        return last_position(mask_bt)
    counts_bt = mask_bt.astype(bool) & (tokens_bt != pad_token_id)
    return jnp.where(counts_bt.any(axis=1), last_position(counts_bt), 0)
