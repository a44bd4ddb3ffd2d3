"""A discriminator between policy and human latents, whose logit estimates a log density ratio.

    D(z) = log p_policy(z) / p_human(z)

The discriminator is trained to tell human (0) from policy latents (1), with as many of each in a
minibatch. Its logit then tends to D, whose mean over policy samples estimates KL(policy ‖ human) on
the chosen latents. Latents are standardised with the mean and standard deviation of the human
buffer. Source: Sugiyama et al., density-ratio estimation by logistic regression.

D is clipped to ±log N for N human responses: from N samples no larger divergence can be told from
an infinite one (McAllester & Stratos, arXiv 1811.04251). Without the bound, a discriminator that is
right every time would set the reward by how long it has been trained.
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
from sarm_jax.parallel.finite import first_not_finite
from sarm_jax.reporting.spread import ROUNDING


@dataclasses.dataclass(frozen=True)
class DiscriminatorConfig:
    """Options of the discriminator, the section `discriminator` of a config; same defaults.

    It takes `steps` optimizer steps per PPO step, each on `batch_size` human and as many policy
    rows.

    Raises:
        InputError: an option is invalid; the message names `discriminator.<field>` and its value.
    """

    learning_rate: float = 1e-3
    hidden_size: int = 64
    steps: int = 4
    batch_size: int = 32
    weight_decay: float = 1e-2

    def __post_init__(self) -> None:
        for name in ("hidden_size", "steps", "batch_size"):
            if getattr(self, name) < 1:
                raise InputError(f"discriminator.{name}={getattr(self, name)}: must be at least 1")
        if not 0 < self.learning_rate < float("inf"):
            raise InputError(f"discriminator.learning_rate={self.learning_rate}: must be positive")
        if not 0 <= self.weight_decay < float("inf"):
            raise InputError(
                f"discriminator.weight_decay={self.weight_decay}: must not be negative"
            )


class Discriminator(nnx.Module):
    """A network of two layers, from latents `[N, S]` to logits `[N]`, positive for the policy."""

    def __init__(self, latents: int, hidden_size: int, *, rngs: nnx.Rngs):
        self.hidden = nnx.Linear(latents, hidden_size, rngs=rngs)
        self.out = nnx.Linear(hidden_size, 1, kernel_init=nnx.initializers.zeros, rngs=rngs)

    def __call__(self, z_ns: jax.Array) -> jax.Array:
        return self.out(jax.nn.relu(self.hidden(z_ns)))[:, 0]


@struct.dataclass
class DensityRatioState:
    """Parameters of the discriminator, and Adam's moments."""

    params: nnx.State
    opt_state: optax.OptState


@struct.dataclass
class HumanBuffer:
    """Standardised human latents `[N, S]`, with the mean and deviation of each latent `[S]`."""

    z_ns: jax.Array
    mean_s: jax.Array
    deviation_s: jax.Array

    def standardise(self, z_bs: jax.Array) -> jax.Array:
        """Standardises other latents with the same mean and deviation."""
        return (z_bs.astype(jnp.float32) - self.mean_s) / self.deviation_s


class DensityRatio:
    """The estimator of D for one run; holds no state that changes.

    Args:
        config: size and training of the discriminator.
        z_ns: the buffer of human latents, `[N, S]`.

    Raises:
        InputError: their mean or deviation is not finite in float32.
    """

    def __init__(self, config: DiscriminatorConfig, z_ns: ArrayLike):
        self.config = config
        z_ns = jnp.asarray(z_ns, jnp.float32)
        mean_s, deviation_s = z_ns.mean(axis=0), _deviations(z_ns)
        if first_not_finite([("mean", mean_s), ("deviation", deviation_s)]):
            largest = float(jnp.abs(z_ns).max())
            raise InputError(
                f"reward.human_latents: latents up to {largest:.3g} are too large to be compared"
            )
        # An argument of the programs below: as a constant it would be compiled into each of them.
        self._human = HumanBuffer((z_ns - mean_s) / deviation_s, mean_s, deviation_s)
        self._bound = float(np.log(len(z_ns)))
        self._optimizer = optax.adamw(config.learning_rate, weight_decay=config.weight_decay)
        model = Discriminator(z_ns.shape[1], config.hidden_size, rngs=nnx.Rngs(0))
        self._graphdef = nnx.graphdef(model)

    def init(self, key: jax.Array) -> DensityRatioState:
        """Returns a fresh state, for which D = 0 everywhere."""
        size = self._human.z_ns.shape[1]
        model = Discriminator(size, self.config.hidden_size, rngs=nnx.Rngs(params=key))
        params = nnx.state(model)
        return DensityRatioState(params, self._optimizer.init(params))

    def update(
        self, state: DensityRatioState, z_bs: jax.Array, key: jax.Array
    ) -> tuple[DensityRatioState, jax.Array, dict[str, jax.Array]]:
        """Trains on the policy latents of a PPO step, then evaluates D on them.

        Returns:
            The new state; D `[B]` of `z_bs` under that state; and the metrics `disc_loss`,
            `disc_acc` and `skipped`. If training made a number non-finite, the state is unchanged
            and `skipped` is the number of optimizer steps that were not applied, otherwise 0.
        """
        return self._update(self._human, state, z_bs, key)

    def read(self, state: DensityRatioState, z_bs: jax.Array) -> jax.Array:
        """Evaluates D `[B]` without training."""
        return self._read(self._human, state, z_bs)

    @partial(jax.jit, static_argnums=0)
    def _update(self, human: HumanBuffer, state: DensityRatioState, z_bs, key):
        z_bs = human.standardise(z_bs)
        size, logits = self.config.batch_size, self._logits

        def loss(params, human_ns, policy_ns):
            d_human, d_policy = logits(params, human_ns), logits(params, policy_ns)
            loss = jax.nn.softplus(d_human).mean() + jax.nn.softplus(-d_policy).mean()
            return 0.5 * loss, 0.5 * ((d_human < 0).mean() + (d_policy > 0).mean())

        def step(state, key):
            human_key, policy_key = jax.random.split(key)
            human_ns = jax.random.choice(human_key, human.z_ns, (size,))
            policy_ns = jax.random.choice(policy_key, z_bs, (size,))
            grad_fn = jax.value_and_grad(loss, has_aux=True)
            (value, accuracy), grads = grad_fn(state.params, human_ns, policy_ns)
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
        return state, self._bounded(logits(state.params, z_bs)), metrics

    @partial(jax.jit, static_argnums=0)
    def _read(self, human: HumanBuffer, state: DensityRatioState, z_bs):
        return self._bounded(self._logits(state.params, human.standardise(z_bs)))

    def _bounded(self, d_b: jax.Array) -> jax.Array:
        return jnp.clip(d_b, -self._bound, self._bound)

    def _logits(self, params: nnx.State, z_ns: jax.Array) -> jax.Array:
        return nnx.merge(self._graphdef, params)(z_ns)


def _deviations(z_ns: jax.Array) -> jax.Array:
    """Returns the standard deviation σ of each latent, by which it is divided, `[S]`.

    A latent that is the same in all human responses, up to rounding, has no σ. It gets the root
    mean square of the others' σ: divided by almost 0, a policy response in which it fires would
    outweigh all others.
    """
    variance_s = z_ns.var(axis=0)
    # Equal values may have a rounded variance.
    varied_s = jnp.ptp(z_ns, axis=0) > ROUNDING * jnp.abs(z_ns).max(axis=0)
    mean = jnp.where(varied_s, variance_s, 0).sum() / jnp.maximum(varied_s.sum(), 1)
    typical = jnp.where(mean > 0, jnp.sqrt(mean), 1.0)
    return jnp.where(varied_s, jnp.sqrt(variance_s) + 1e-6, typical)
