"""SARM: a reward that is a sum of sparse features.

    h = trunk(tokens) at the end-of-turn token;  z = SAE(standardise(h));  R = w · z'

where z' is z after an optional intervention on chosen features. The trunk is the first
`source_layer` layers of a decoder, without its final norm. Source: arXiv 2508.08746.

An ensemble has H heads on the same latents, trained on resampled pairs:

    R_h = w_h · z' + b_h;   R = w̄ · z' ("mean") or R = min_h R_h ("min", the worst of the ensemble)

w̄ is the mean of the w_h. The b_h centre the heads, see `centre_heads`. Sources: Coste et al.
2310.02743 (mean and worst case over reward models); with linear heads on the same latents the mean
score is the score of the mean weights (WARM, Ramé et al. 2401.12187).

Deliberate deviations: pooling reads the last position of the mask (the reference looks for the
first pad token, which fails with left padding or if pad equals eos), and the SAE runs only on the
pooled token (the reference runs it on every token and drops the others).
"""

import dataclasses
from typing import Any, Protocol

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx, struct

from sarm_jax.io.errors import InputError
from sarm_jax.models.checks import (
    check_batch,
    check_features,
    check_no_row_is_empty,
    is_index,
)
from sarm_jax.models.llama import Llama, LlamaConfig
from sarm_jax.models.sae import SAE, SAEConfig, standardise
from sarm_jax.parallel.processes import fetch

LARGEST = float(np.finfo(np.float32).max)
ACTIVATIONS = ("topk", "identity")  # of the SAE of a SARM
ENSEMBLES = ("mean", "min")


@dataclasses.dataclass(frozen=True)
class SARMConfig:
    """The architecture of a SARM; `trunk.num_hidden_layers` is the SAE's source layer.

    `heads` is the number of heads H of an ensemble, 1 for a SARM as published.
    """

    trunk: LlamaConfig
    sae: SAEConfig
    heads: int = 1

    def __post_init__(self) -> None:
        activation = self.sae.activation
        if activation not in ACTIVATIONS:  # training and scoring would compute different latents
            raise InputError(f"sae.activation={activation!r}: a SARM has topk or identity")

    @property
    def latent_size(self) -> int:
        """The number of features."""
        return self.sae.latent_size


class RewardArchitecture(Protocol):
    """The fields of every reward model's config that its inputs are checked against."""

    @property
    def trunk(self) -> LlamaConfig: ...

    @property
    def latent_size(self) -> int: ...


@struct.dataclass
class Intervention:
    """z'_i = clip(multiply · z_i + add, minimum, maximum) for S selected features, arrays `[S]`.

    Setting a feature to v is multiply = 0 and add = v; steering multiplies or adds; bounds are
    minimum and maximum.
    """

    indices: jax.Array
    multiply: jax.Array
    add: jax.Array
    minimum: jax.Array
    maximum: jax.Array

    def __call__(self, z_bf: jax.Array) -> jax.Array:
        """Applies the intervention to latents `[B, M]`; all other features stay as they are."""
        z_bs = z_bf[:, self.indices] * self.multiply + self.add
        z_bs = jnp.clip(z_bs, self.minimum, self.maximum)
        return z_bf.at[:, self.indices].set(z_bs, unique_indices=True)

    def check(self, latent_size: int) -> None:
        """Raises InputError if it does not fit a SARM of so many latents, or has NaN.

        Inside a program nothing is checked.
        """
        if any(isinstance(x, jax.core.Tracer) for x in jax.tree.leaves(self)):
            return
        indices = check_features("the intervention", self.indices, latent_size)
        if len(set(indices.tolist())) < len(indices):
            raise InputError("the intervention names a feature twice")
        for name in ("multiply", "add", "minimum", "maximum"):
            if np.isnan(np.asarray(getattr(self, name))).any():
                raise InputError(f"the intervention: {name} holds NaN")
        for name in ("multiply", "add"):
            if not np.isfinite(np.asarray(getattr(self, name))).all():
                raise InputError(f"the intervention: {name} holds infinity")
        low, high = np.asarray(self.minimum), np.asarray(self.maximum)
        if (low > high).any() or (low == np.inf).any() or (high == -np.inf).any():
            raise InputError("the intervention: a minimum is above its maximum, or infinite")

    def neutral(self) -> "Intervention":
        """Returns an intervention of the same shape without effect, for use in the same program."""
        one, infinity = jnp.ones_like(self.add), jnp.full_like(self.add, jnp.inf)
        return Intervention(
            indices=self.indices, multiply=one, add=0 * one, minimum=-infinity, maximum=infinity
        )


def intervention(
    latent_size: int,
    *,
    set_to: dict[int, float] | None = None,
    minimum: dict[int, float] | None = None,
    maximum: dict[int, float] | None = None,
    steer: dict[int, tuple[str, float]] | None = None,
) -> Intervention:
    """Builds an `Intervention` from maps of feature id → value.

    Args:
        latent_size: the number of features of the SARM.
        set_to: values to set features to.
        minimum: lower bounds.
        maximum: upper bounds.
        steer: `("*", factor)` or `("+", offset)`, as in a steering file.

    Raises:
        InputError: a feature does not exist, has a value that is not finite, is set and also
            steered or bounded, or has a minimum above its maximum.
    """
    set_to, minimum, maximum, steer = set_to or {}, minimum or {}, maximum or {}, steer or {}
    for values in (set_to, minimum, maximum, {i: value for i, (_, value) in steer.items()}):
        _check_values(values, latent_size)
    ids = sorted({*set_to, *minimum, *maximum, *steer})
    rows = []
    for i in ids:
        if i in set_to and (i in steer or i in minimum or i in maximum):
            raise InputError(f"feature {i} is set to {set_to[i]}: it cannot be bounded as well")
        low, high = minimum.get(i, -np.inf), maximum.get(i, np.inf)
        if low > high:
            raise InputError(f"feature {i}: clamp minimum {low} exceeds its maximum {high}")
        operation, value = steer.get(i, ("+", 0.0))
        if operation not in ("*", "+"):
            raise InputError(f"feature {i}: steering operation {operation!r}, expected '*' or '+'")
        multiply, add = (value, 0.0) if operation == "*" else (1.0, value)
        if i in set_to:
            multiply, add = 0.0, set_to[i]
        rows.append((multiply, add, low, high))
    columns = np.asarray(rows, np.float32).reshape(len(ids), 4).T
    multiply_s, add_s, minimum_s, maximum_s = (jnp.asarray(column) for column in columns)
    return Intervention(
        indices=jnp.asarray(ids, jnp.int32),
        multiply=multiply_s,
        add=add_s,
        minimum=minimum_s,
        maximum=maximum_s,
    )


def _check_values(values: dict[int, float], latent_size: int) -> None:
    """Raises InputError for a feature that does not exist, or a value that is no float32."""
    for i, value in values.items():
        if not is_index(i, latent_size):
            raise InputError(f"feature {i!r} does not exist: the SAE has {latent_size} latents")
        number = np.asarray(value)
        is_number = number.ndim == 0 and np.issubdtype(number.dtype, np.number)
        if not (is_number and abs(float(value)) <= LARGEST):
            raise InputError(f"feature {i}: {value!r} is not a finite number of float32")


class SARM(nnx.Module):
    """The reward model: `trunk`, `sae`, and the head weights `score [M]` without bias.

    An ensemble has the weights `score [H, M]` and the biases `score_bias [H]`; `ensemble` is one of
    `ENSEMBLES` and says how their scores are combined.
    """

    ensemble = "mean"

    def __init__(self, config: SARMConfig, *, dtype: Any = jnp.float32, rngs: nnx.Rngs):
        self.config = config
        self.trunk = Llama(config.trunk, dtype=dtype, rngs=rngs, final_norm=False, head=False)
        self.sae = SAE(config.sae, dtype=dtype, rngs=rngs)
        shape: tuple[int, ...] = (config.sae.latent_size,)
        if config.heads > 1:
            shape = (config.heads, *shape)
            self.score_bias = nnx.Param(jnp.zeros((config.heads,), dtype))
        self.score = nnx.Param(jnp.zeros(shape, dtype))

    def __call__(
        self, tokens_bt: jax.Array, mask_bt: jax.Array, change: Intervention | None = None
    ) -> tuple[jax.Array, jax.Array]:
        """Returns (scores `[B]` of the changed latents, the latents `[B, M]` before the change).

        Raises:
            InputError: a shape, a dtype, a token id, a length or the change is wrong.
        """
        check_inputs(self.config, tokens_bt, mask_bt, change)
        x_bd = self.pooled(tokens_bt, mask_bt)
        z_bf = self.sae.encode(x_bd)
        return self.reward(x_bd, z_bf, change), z_bf

    def pooled(self, tokens_bt: jax.Array, mask_bt: jax.Array) -> jax.Array:
        """Returns the standardised trunk state at each row's last real token, float32 `[B, D]`."""
        h_btd = self.trunk.hidden(tokens_bt, mask_bt)
        return standardise(h_btd[jnp.arange(h_btd.shape[0]), last_position(mask_bt)])

    def reward(
        self, x_bd: jax.Array, z_bf: jax.Array, change: Intervention | None = None
    ) -> jax.Array:
        """Computes the rewards `[B]` of latents, which alone decide it, under a change."""
        del x_bd  # a reward model whose SAE leaves something out reads the states as well
        return self.head(z_bf if change is None else change(z_bf))

    def feature_weights(self) -> np.ndarray:
        """Returns what a unit of every latent adds to the reward, float32 `[M]`.

        For an ensemble these are the weights of the mean head, whatever `ensemble` is.
        """
        return np.asarray(fetch(self._mean_weights()), np.float32)

    def head(self, z_bf: jax.Array) -> jax.Array:
        """Computes w · z `[B]` in full float32, on GPUs too; of an ensemble, the combined score."""
        if self.config.heads > 1 and self.ensemble == "min":
            return self.scores_by_head(z_bf).min(axis=1)
        return jnp.dot(z_bf, self._mean_weights(), precision=jax.lax.Precision.HIGHEST)

    def scores_by_head(self, z_bf: jax.Array) -> jax.Array:
        """Computes the centred scores `[B, H]` of the heads of an ensemble."""
        weights_hf, bias_h = (p[...].astype(jnp.float32) for p in (self.score, self.score_bias))
        return jnp.dot(z_bf, weights_hf.T, precision=jax.lax.Precision.HIGHEST) + bias_h

    def _mean_weights(self) -> jax.Array:
        weights = self.score[...].astype(jnp.float32)
        return weights if self.config.heads == 1 else weights.mean(axis=0)


def centre_heads(score_nh: np.ndarray) -> np.ndarray:
    """Returns the biases `[H]` that give all heads the same mean score on N responses.

    Bradley–Terry leaves the offset of a head open, so without them the least score would often be
    that of the head with the lowest offset. The biases add up to 0, so that the mean of the heads
    has none. Coste et al. standardise their reward models in the same way; the scale is kept here,
    since Bradley–Terry does fix it.
    """
    mean_h = score_nh.astype(np.float64).mean(axis=0)
    return (mean_h.mean() - mean_h).astype(np.float32)


def check_ensemble(ensemble: str, config: Any) -> None:
    """Raises InputError if a reward model of this architecture has no such ensemble.

    Args:
        ensemble: the option `reward.ensemble`.
        config: the architecture of a SARM or of another reward model, which has one head.
    """
    if ensemble not in ENSEMBLES:
        raise InputError(f"reward.ensemble={ensemble!r}: expected one of {', '.join(ENSEMBLES)}")
    if ensemble != "mean" and getattr(config, "heads", 1) == 1:
        raise InputError(
            f"reward.ensemble={ensemble!r}: the reward model has one head; train_sarm.heads trains "
            "several"
        )


def check_inputs(
    config: RewardArchitecture,
    tokens_bt: jax.Array,
    mask_bt: jax.Array,
    change: Intervention | None,
) -> None:
    """Checks what a reward model is called with; inside a program little of it is known.

    Raises:
        InputError: a shape, a dtype, a token id, a length or the change is wrong.
    """
    trunk = config.trunk
    length_b = check_batch(
        tokens_bt, mask_bt, vocab_size=trunk.vocab_size, positions=trunk.positions
    )
    check_no_row_is_empty(length_b)
    if change is not None:
        change.check(config.latent_size)


def last_position(mask_bt: jax.Array) -> jax.Array:
    """Returns the index of the last 1 of each row, `[B]`, for padding on either side."""
    length = mask_bt.shape[1]
    return length - 1 - jnp.argmax(mask_bt.astype(bool)[:, ::-1], axis=1)
