"""Discriminators between policy and human latents, whose logits estimate a log density ratio.

    D(z) = log p_policy(z) / p_human(z)

A discriminator is trained to tell human (0) from policy latents (1), with as many of each in a
minibatch. Its logit then tends to D, whose mean over policy samples estimates KL(policy ‖ human) on
the chosen latents. Latents are standardised with the mean and standard deviation of the human
buffer. Source: Sugiyama et al., density-ratio estimation by logistic regression.

A discriminator that is read on rows it was trained on, or that has learned the human rows by heart,
reads too large a divergence. Human and policy rows are therefore divided into `folds`, and there is
one discriminator per fold, which is trained on the other folds' rows and read on its own fold's
(cross-fitting, Chernozhukov et al., arXiv 1608.00060):

- Of the states that a step's training passes through, from its start on, the one with the least
  cross-entropy on the rows of its own fold is kept. A discriminator whose held-out loss rises
  therefore stands still.
- log mean exp(D) over the human rows of its own fold is subtracted from D, if it is positive: the
  mean of p_policy / p_human over human rows is at most 1, and less only if the policy gives what
  humans never do. The mean of D over the policy rows is then the bound of Donsker and Varadhan, or
  below it, on rows that no part of it was trained on.

D is clipped to ±log N for N human responses: from N samples no larger divergence can be told from
an infinite one (McAllester & Stratos, arXiv 1811.04251). Without the bound, a discriminator that is
right every time would set the reward by how long it has been trained.
"""

import dataclasses
from collections.abc import Hashable, Sequence
from functools import cached_property, partial
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
from flax import nnx, struct
from jax.typing import ArrayLike

from sarm_jax.io.errors import InputError
from sarm_jax.parallel.finite import first_not_finite
from sarm_jax.reporting.spread import ROUNDING

LATENT_KL_COLUMNS = ("latent_kl", "latent_kl_se")  # metrics that need more than one fold


@dataclasses.dataclass(frozen=True)
class DiscriminatorConfig:
    """Options of the discriminators, the section `discriminator` of a config; same defaults.

    Each takes `steps` optimizer steps per PPO step, each on `batch_size` human and as many policy
    rows. `folds` = 1: one discriminator, which is read on the rows that it was trained on.

    Raises:
        InputError: an option is invalid; the message names `discriminator.<field>` and its value.
    """

    learning_rate: float = 1e-3
    hidden_size: int = 64
    steps: int = 16
    batch_size: int = 32
    weight_decay: float = 1e-2
    folds: int = 4

    def __post_init__(self) -> None:
        for name in ("hidden_size", "steps", "batch_size", "folds"):
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
    """Parameters of the discriminators and Adam's moments; a leading axis K if folds K > 1."""

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


@struct.dataclass
class FoldedRows:
    """Rows of latents `[N, S]`, and which of them are held out from training, bool `[N]`."""

    z_ns: jax.Array
    held_out_n: jax.Array

    def draw(self, key: jax.Array, size: int) -> jax.Array:
        """Draws `[size, S]` rows to train on, with replacement; any rows if all are held out."""
        weights_n = _or_all(~self.held_out_n)
        return jax.random.choice(key, self.z_ns, (size,), p=weights_n / weights_n.sum())

    def held_out_mean(self, values_n: jax.Array) -> jax.Array:
        """Averages over the held-out rows; over all rows if none is held out."""
        weights_n = _or_all(self.held_out_n)
        return (values_n * weights_n).sum() / weights_n.sum()


def _or_all(chosen_n: jax.Array) -> jax.Array:
    """Returns 1 for chosen rows and 0 for others, `[N]` float32; 1 for all, if none is chosen."""
    return jnp.where(chosen_n.any(), chosen_n, True).astype(jnp.float32)


@dataclasses.dataclass(frozen=True)
class _Estimator:
    """The programs of a `DensityRatio`; equal ones share what has been compiled.

    The human latents are an argument of the programs: as a constant they would be compiled into
    each of them.
    """

    config: DiscriminatorConfig
    humans: int
    latents: int

    @property
    def folds(self) -> int:
        return min(self.config.folds, self.humans)

    @property
    def bound(self) -> float:
        """The largest |D| in nats."""
        return float(np.log(self.humans))

    @cached_property
    def optimizer(self) -> optax.GradientTransformation:
        return optax.adamw(self.config.learning_rate, weight_decay=self.config.weight_decay)

    def discriminator(self, rngs: nnx.Rngs) -> Discriminator:
        return Discriminator(self.latents, self.config.hidden_size, rngs=rngs)

    @cached_property
    def graphdef(self) -> nnx.GraphDef:
        return nnx.graphdef(nnx.eval_shape(lambda: self.discriminator(nnx.Rngs(0))))

    def init(self, key: jax.Array) -> DensityRatioState:
        if self.folds == 1:
            return self._init_one(key)
        return jax.vmap(self._init_one)(jax.random.split(key, self.folds))

    def _init_one(self, key: jax.Array) -> DensityRatioState:
        params = nnx.state(self.discriminator(nnx.Rngs(params=key)))
        return DensityRatioState(params, self.optimizer.init(params))

    @partial(jax.jit, static_argnums=0)
    def update(self, human: HumanBuffer, state: DensityRatioState, z_bs, key, group_b):
        z_bs = human.standardise(z_bs)
        if self.folds == 1:
            keys = jax.random.split(key, self.config.steps)
            new, (losses, accuracies) = self._train_on_all(state, human.z_ns, z_bs, keys)
            state, finite = _keep_finite(new, state, losses)
            d_b = self._bounded(self._logits(state.params, z_bs))
            metrics = {"disc_loss": losses.mean(), "disc_acc": accuracies.mean()}
        else:
            state, finite, d_b, metrics = self._cross_fit(human.z_ns, state, z_bs, key, group_b)
        metrics["skipped"] = jnp.where(finite, 0, self.config.steps)
        return state, d_b, metrics

    def _cross_fit(self, human_ns, state, z_bs, key, group_b):
        """Returns the new state, whether it is finite, D and the metrics."""
        fold_k = jnp.arange(self.folds)
        fold_n = jnp.arange(len(human_ns)) % self.folds
        rows_b = jnp.arange(len(z_bs))
        enough = jnp.max(group_b) + 1 >= self.folds
        fold_b = jnp.where(enough, group_b, rows_b) % self.folds
        # The rows are the same for all discriminators: only which are held out has an axis K.
        human = FoldedRows(human_ns, fold_n == fold_k[:, None])
        policy = FoldedRows(z_bs, fold_b == fold_k[:, None])
        rows: Any = FoldedRows(None, 0)  # type: ignore[arg-type]
        keys = jax.random.split(key, self.folds)
        new, losses = jax.vmap(self._train, in_axes=(0, rows, rows, 0))(state, human, policy, keys)
        state, finite = _keep_finite(new, state, losses)

        loss_k, accuracy_k = jax.vmap(self._held_out, in_axes=(0, rows, rows))(
            state.params, human, policy
        )
        excess_k, variance_k = jax.vmap(self._excess, in_axes=(0, rows))(state.params, human)
        d_kb = jax.vmap(self._logits_bounded, in_axes=(0, None))(state.params, z_bs)
        d_b = self._bounded(d_kb[fold_b, rows_b] - excess_k[fold_b])
        share_k = (fold_b == fold_k[:, None]).mean(axis=1)  # of the policy rows
        variance = _variance_of_mean(d_b, group_b) + (variance_k * share_k**2).sum()
        metrics = {
            "disc_loss": loss_k @ share_k,
            "disc_acc": accuracy_k @ share_k,
            "latent_kl": d_b.mean(),
            "latent_kl_se": jnp.sqrt(variance),
        }
        return state, finite, d_b, metrics

    def _train(self, state: DensityRatioState, human: FoldedRows, policy: FoldedRows, key):
        """Trains one discriminator; returns its state of least held-out loss, and all losses."""
        size = self.config.batch_size

        def step(carry, key):
            state, best, least = carry
            human_key, policy_key = jax.random.split(key)
            batch = human.draw(human_key, size), policy.draw(policy_key, size)
            state, (loss, _) = self._optimizer_step(state, *batch)
            held_out, _ = self._held_out(state.params, human, policy)
            better = held_out < least
            best = jax.tree.map(lambda new, old: jnp.where(better, new, old), state, best)
            return (state, best, jnp.where(better, held_out, least)), loss

        before, _ = self._held_out(state.params, human, policy)
        keys = jax.random.split(key, self.config.steps)
        (last, best, _), losses = jax.lax.scan(step, (state, state, before), keys)
        finite = jnp.stack([jnp.isfinite(x).all() for x in jax.tree.leaves(last)]).all()
        return best, jnp.where(finite, losses, jnp.nan)

    def _train_on_all(self, state, human_ns, policy_ns, keys):
        """Trains one discriminator on all rows; returns it with loss and accuracy of each step."""
        size = self.config.batch_size

        def step(state, key):
            human_key, policy_key = jax.random.split(key)
            human = jax.random.choice(human_key, human_ns, (size,))
            policy = jax.random.choice(policy_key, policy_ns, (size,))
            return self._optimizer_step(state, human, policy)

        return jax.lax.scan(step, state, keys)

    def _optimizer_step(self, state: DensityRatioState, human_ns, policy_ns):
        """Takes one step; returns the new state, and loss and accuracy before it."""

        def loss(params):
            d_human, d_policy = self._logits(params, human_ns), self._logits(params, policy_ns)
            loss = jax.nn.softplus(d_human).mean() + jax.nn.softplus(-d_policy).mean()
            return 0.5 * loss, 0.5 * ((d_human < 0).mean() + (d_policy > 0).mean())

        values, grads = jax.value_and_grad(loss, has_aux=True)(state.params)
        updates, opt_state = self.optimizer.update(grads, state.opt_state, state.params)
        return DensityRatioState(optax.apply_updates(state.params, updates), opt_state), values

    def _held_out(self, params, human: FoldedRows, policy: FoldedRows):
        """Returns cross-entropy and accuracy on the rows that are held out."""
        d_human, d_policy = self._logits(params, human.z_ns), self._logits(params, policy.z_ns)
        losses = (
            human.held_out_mean(jax.nn.softplus(d_human)),
            policy.held_out_mean(jax.nn.softplus(-d_policy)),
        )
        # A logit of 0 is half right.
        margin = policy.held_out_mean(jnp.sign(d_policy)) - human.held_out_mean(jnp.sign(d_human))
        return 0.5 * (losses[0] + losses[1]), 0.5 + 0.25 * margin

    def _excess(self, params, human: FoldedRows):
        """Returns log mean exp(D) over held-out human rows, at least 0, and its variance."""
        ratio_n = jnp.exp(self._logits_bounded(params, human.z_ns))
        mean = human.held_out_mean(ratio_n)
        variance = human.held_out_mean((ratio_n - mean) ** 2) / human.held_out_n.sum()
        return jnp.maximum(jnp.log(mean), 0), variance / mean**2

    @partial(jax.jit, static_argnums=0)
    def read(self, human: HumanBuffer, state: DensityRatioState, z_bs):
        z_bs = human.standardise(z_bs)
        if self.folds == 1:
            return self._logits_bounded(state.params, z_bs)
        fold_n, human_ns = jnp.arange(len(human.z_ns)) % self.folds, human.z_ns

        def read_one(params, k):
            excess, _ = self._excess(params, FoldedRows(human_ns, fold_n == k))
            return self._logits_bounded(params, z_bs) - excess

        d_kb = jax.vmap(read_one)(state.params, jnp.arange(self.folds))
        return self._bounded(d_kb.mean(axis=0))

    def _bounded(self, d_b: jax.Array) -> jax.Array:
        return jnp.clip(d_b, -self.bound, self.bound)

    def _logits_bounded(self, params: nnx.State, z_ns: jax.Array) -> jax.Array:
        return self._bounded(self._logits(params, z_ns))

    def _logits(self, params: nnx.State, z_ns: jax.Array) -> jax.Array:
        return nnx.merge(self.graphdef, params)(z_ns)


class DensityRatio:
    """The estimator of D for one run; holds no state that changes.

    Args:
        config: size and training of the discriminators.
        z_ns: the buffer of human latents, `[N, S]`.

    Attributes:
        folds: number of discriminators, at most N.

    Raises:
        InputError: the mean or the deviation of the latents is not finite in float32.
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
        self._human = HumanBuffer((z_ns - mean_s) / deviation_s, mean_s, deviation_s)
        self._estimator = _Estimator(config, humans=len(z_ns), latents=z_ns.shape[1])
        self.folds = self._estimator.folds

    def init(self, key: jax.Array) -> DensityRatioState:
        """Returns a fresh state, for which D = 0 everywhere."""
        return self._estimator.init(key)

    def update(
        self,
        state: DensityRatioState,
        z_bs: ArrayLike,
        key: jax.Array,
        group_b: np.ndarray | None = None,
    ) -> tuple[DensityRatioState, jax.Array, dict[str, jax.Array]]:
        """Trains on the policy latents of a PPO step, then evaluates D on them.

        Args:
            state: state before the step.
            z_bs: latents of the policy's responses, `[B, S]`.
            key: random key of the minibatches.
            group_b: rows of one group are in one fold, see `groups_of`; None: rows are unrelated.

        Returns:
            The new state; D `[B]` of `z_bs` under that state; and the metrics. With folds,
            `latent_kl` is the mean of D and `latent_kl_se` its standard error, in nats, and
            `disc_loss` and `disc_acc` are of rows that are held out; with one discriminator they
            are of its minibatches. If training made a number non-finite, the state is unchanged and
            `skipped` is the number of optimizer steps that were not applied, otherwise 0.
        """
        z_bs = jnp.asarray(z_bs)
        groups_b = jnp.arange(len(z_bs)) if group_b is None else jnp.asarray(group_b)
        return self._estimator.update(self._human, state, z_bs, key, groups_b)

    def read(self, state: DensityRatioState, z_bs: ArrayLike) -> jax.Array:
        """Evaluates D `[B]` of rows that no discriminator was trained on, without training."""
        return self._estimator.read(self._human, state, jnp.asarray(z_bs))


def groups_of(prompts: Sequence[Hashable]) -> np.ndarray:
    """Numbers the rows by prompt, from 0 in order of appearance, `[B]`.

    Responses to one prompt resemble each other, so that a discriminator which was trained on one
    has seen much of the other. If all have the same prompt, each is a group of its own.
    """
    numbers: dict[Hashable, int] = {}
    group_b = np.asarray([numbers.setdefault(prompt, len(numbers)) for prompt in prompts])
    return group_b if len(numbers) > 1 else np.arange(len(prompts))


def _keep_finite(new: DensityRatioState, old: DensityRatioState, losses: jax.Array):
    """Returns (new, True), or (old, False) if a number of the training is not finite."""
    numbers = jax.tree.leaves((new, losses))
    finite = jnp.stack([jnp.isfinite(x).all() for x in numbers]).all()
    return jax.tree.map(lambda a, b: jnp.where(finite, a, b), new, old), finite


def _variance_of_mean(d_b: jax.Array, group_b: jax.Array) -> jax.Array:
    """Estimates the variance of the mean of D `[B]`; rows of one group are not independent."""
    deviations_g = jax.ops.segment_sum(d_b - d_b.mean(), group_b, num_segments=len(d_b))
    groups = jnp.max(group_b) + 1
    correction = groups / jnp.maximum(groups - 1, 1)
    return correction * (deviations_g**2).sum() / len(d_b) ** 2


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
