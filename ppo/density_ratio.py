"""A discriminator between policy and human latents, read as a log density ratio.

Trained to tell human (0) from policy (1) with as many of each in a minibatch, its logit tends to
D(z) = log p_policy(z) / p_human(z), whose mean over policy samples estimates
KL(policy ‖ human) on the chosen latents. Source: Sugiyama et al., density-ratio estimation by
logistic regression. Latents are standardised with the human buffer's mean and deviation.

What is read is held within ±log N for N human responses: from N samples no larger divergence can
be told from an infinite one (McAllester & Stratos, arXiv 1811.04251), and a discriminator that is
right every time would otherwise set the reward by how long it has been trained.
"""

import dataclasses
from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import optax
from flax import nnx, struct
from jax.typing import ArrayLike

from sarm_jax.io.errors import InputError


@dataclasses.dataclass(frozen=True)
class DiscriminatorConfig:
    """`steps` minibatches of `batch_size` human and as many policy rows per PPO step."""

    learning_rate: float
    hidden_size: int
    steps: int
    batch_size: int
    weight_decay: float

    def __post_init__(self) -> None:
        for name in ("hidden_size", "steps", "batch_size"):
            if getattr(self, name) < 1:
                raise InputError(f"discriminator.{name}={getattr(self, name)}: must be at least 1")
        if not 0 < self.learning_rate < float("inf"):
            raise InputError(f"disc_lr={self.learning_rate}: must be positive")
        if not 0 <= self.weight_decay < float("inf"):
            raise InputError(
                f"discriminator.weight_decay={self.weight_decay}: must not be negative"
            )


class Discriminator(nnx.Module):
    """Two layers: latents `[N, S]` → logits `[N]`, positive for policy."""

    def __init__(self, latents: int, hidden_size: int, *, rngs: nnx.Rngs):
        self.hidden = nnx.Linear(latents, hidden_size, rngs=rngs)
        self.out = nnx.Linear(hidden_size, 1, kernel_init=nnx.initializers.zeros, rngs=rngs)

    def __call__(self, x_ns: jax.Array) -> jax.Array:
        return self.out(jax.nn.relu(self.hidden(x_ns)))[:, 0]


@struct.dataclass
class DensityRatioState:
    """What changes while training: parameters and optimizer moments."""

    params: nnx.State
    opt_state: optax.OptState


@struct.dataclass
class Human:
    """The buffer, standardised `[N, S]`, and what it was standardised with, `[S]`."""

    rows_ns: jax.Array
    mean_s: jax.Array
    deviation_s: jax.Array

    def standardise(self, z_bs: jax.Array) -> jax.Array:
        """Other latents in the same units."""
        return (z_bs.astype(jnp.float32) - self.mean_s) / self.deviation_s


class DensityRatio:
    """The estimator of one run; `human_ns` is the buffer of human latents.

    The buffer is an argument of the programs, or it would be compiled into each of them.
    """

    def __init__(self, config: DiscriminatorConfig, human_ns: ArrayLike):
        self.config = config
        rows_ns = jnp.asarray(human_ns, jnp.float32)
        mean_s, deviation_s = rows_ns.mean(axis=0), _deviations(rows_ns)
        self._human = Human((rows_ns - mean_s) / deviation_s, mean_s, deviation_s)
        self._bound = float(np.log(len(rows_ns)))
        self._optimizer = optax.adamw(config.learning_rate, weight_decay=config.weight_decay)
        model = Discriminator(rows_ns.shape[1], config.hidden_size, rngs=nnx.Rngs(0))
        self._graphdef = nnx.graphdef(model)

    def init(self, key: jax.Array) -> DensityRatioState:
        """A fresh state: D = 0 everywhere."""
        size = self._human.rows_ns.shape[1]
        model = Discriminator(size, self.config.hidden_size, rngs=nnx.Rngs(params=key))
        params = nnx.state(model)
        return DensityRatioState(params, self._optimizer.init(params))

    def update(
        self, state: DensityRatioState, policy_bs: jax.Array, key: jax.Array
    ) -> tuple[DensityRatioState, jax.Array, dict[str, jax.Array]]:
        """Trains on this step's policy latents, then reads them.

        Returns (state, D `[B]` of `policy_bs` under the new state, metrics): disc_loss, disc_acc,
        and `skipped`, which is `steps` where they made a number non-finite: the state is then the
        one before them. Otherwise 0.
        """
        return self._update(self._human, state, policy_bs, key)

    def read(self, state: DensityRatioState, policy_bs: jax.Array) -> jax.Array:
        """D `[B]` of latents that are not trained on."""
        return self._read(self._human, state, policy_bs)

    @partial(jax.jit, static_argnums=0)
    def _update(self, buffer: Human, state: DensityRatioState, policy_bs, key):
        policy_bs = buffer.standardise(policy_bs)
        size, logits = self.config.batch_size, self._logits

        def loss(params, human, policy):
            d_human, d_policy = logits(params, human), logits(params, policy)
            loss = jax.nn.softplus(d_human).mean() + jax.nn.softplus(-d_policy).mean()
            return 0.5 * loss, 0.5 * ((d_human < 0).mean() + (d_policy > 0).mean())

        def step(state, key):
            human_key, policy_key = jax.random.split(key)
            human = jax.random.choice(human_key, buffer.rows_ns, (size,))
            policy = jax.random.choice(policy_key, policy_bs, (size,))
            grad_fn = jax.value_and_grad(loss, has_aux=True)
            (value, accuracy), grads = grad_fn(state.params, human, policy)
            updates, opt_state = self._optimizer.update(grads, state.opt_state, state.params)
            params = optax.apply_updates(state.params, updates)
            return DensityRatioState(params, opt_state), (value, accuracy)

        keys = jax.random.split(key, self.config.steps)
        new, (losses, accuracies) = jax.lax.scan(step, state, keys)
        numbers = jax.tree.leaves((new, losses))
        finite = jnp.stack([jnp.isfinite(x).all() for x in numbers]).all()
        state = jax.tree.map(lambda a, b: jnp.where(finite, a, b), new, state)
        metrics = {"disc_loss": losses.mean(), "disc_acc": accuracies.mean()}
        metrics["skipped"] = jnp.where(finite, 0, self.config.steps)
        return state, self._bounded(logits(state.params, policy_bs)), metrics

    @partial(jax.jit, static_argnums=0)
    def _read(self, buffer: Human, state: DensityRatioState, policy_bs):
        return self._bounded(self._logits(state.params, buffer.standardise(policy_bs)))

    def _bounded(self, d_b: jax.Array) -> jax.Array:
        return jnp.clip(d_b, -self._bound, self._bound)

    def _logits(self, params: nnx.State, x_ns: jax.Array) -> jax.Array:
        return nnx.merge(self._graphdef, params)(x_ns)


def _deviations(rows_ns: jax.Array) -> jax.Array:
    """What latents are divided by: σ, or where no human response ever differs, that of the others
    in the root mean square. Divided by next to nothing, one firing would drown all else."""
    variance_s = rows_ns.var(axis=0)
    varied_s = rows_ns.max(axis=0) > rows_ns.min(axis=0)  # equal rows may have a rounded variance
    mean = jnp.where(varied_s, variance_s, 0).sum() / jnp.maximum(varied_s.sum(), 1)
    typical = jnp.where(mean > 0, jnp.sqrt(mean), 1.0)
    return jnp.where(varied_s, jnp.sqrt(variance_s) + 1e-6, typical)
