"""Pretraining of a SARM's sparse autoencoder on the activations of its frozen trunk.

    loss = mean_n ‖x̂_n − x_n‖² / ‖x_n‖²  +  w_aux · mean_n ‖ê_n − e_n‖² / ‖e_n‖²

e = x − x̂ carries no gradient. ê is its reconstruction by the `aux_k` strongest *dead* latents,
which are those that fired for no token of the last `dead_after_steps` batches. The second term
revives them (AuxK). Decoder rows are kept at unit length. Source: Gao et al. 2406.04093.

The activations are those of the last assistant turn, to which the SARM's reconstruction loss is
masked. The head reads only one token of the turn, the pooled token. Therefore explained variance is
also reported on the pooled tokens alone, about their own mean.

The decoder starts at random directions and the encoder at its transpose, scaled so that the first
reconstructions have the right length.

Deliberate deviations: a fixed share of each minibatch are pooled tokens, and `pre_bias` starts at
their mean (Gao: at the geometric median of all tokens). Pooled states form a small cloud far from
the other states. With these changes the k latents are not spent on the offset of the cloud, and the
cloud itself is reconstructed far better.
"""

import dataclasses
from collections.abc import Iterator
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
from flax import nnx
from jax.stages import Lowered
from tqdm import tqdm

from sarm_jax.io.errors import InputError
from sarm_jax.models.sae import SAE, reconstruction_loss, top_k
from sarm_jax.parallel.processes import fetch, raising_on_all
from sarm_jax.parallel.sharding import ONE_DEVICE, Placement
from sarm_jax.reporting.spread import is_constant
from sarm_jax.training.activations import (
    BLOCK,
    Activations,
    Rows,
    all_equal,
    mean_row,
    pieces,
    read_rows,
)
from sarm_jax.training.divergence import check_loss, check_weights
from sarm_jax.training.progress import NOTHING_KEPT, Log, Progress
from sarm_jax.training.schedule import warmup_cosine

STEPS_PER_CALL = 20  # minibatches on the device at a time
# A reconstruction by 0 has a loss of 1, one that has the right length in a wrong direction of 4.
LARGEST_LOSS = 10.0
POOLED_FRACTION = 0.5  # of each minibatch; a random minibatch would have a few per cent


@dataclasses.dataclass(frozen=True)
class SAETraining:
    """Options of SAE pretraining.

    Attributes:
        steps: number of optimizer steps.
        batch_tokens: activations per step.
        learning_rate: peak learning rate.
        warmup_fraction: share of the steps in which the rate rises.
        dead_after_steps: steps without firing after which a latent counts as dead.
        aux_k: dead latents that reconstruct the residual.
        aux_weight: w_aux.
        seed: seed of the initialisation and of the minibatches.
        rate_option: the option that gives the learning rate, for messages.
    """

    steps: int
    batch_tokens: int
    learning_rate: float
    warmup_fraction: float
    dead_after_steps: int
    aux_k: int
    aux_weight: float
    seed: int
    rate_option: str = "train_sarm.sae_learning_rate"


def pretrain_sae(
    sae: SAE,
    train: Activations,
    held_out: Activations,
    options: SAETraining,
    log: Log,
    placement: Placement = ONE_DEVICE,
    progress: Progress = NOTHING_KEPT,
) -> tuple[SAE, dict[str, float | None]]:
    """Trains a copy of an SAE.

    Args:
        sae: an SAE of the wanted sizes; its weights are not used.
        train: activations to train on.
        held_out: activations of the metrics.
        options: options of the training.
        log: receives a metrics row every `STEPS_PER_CALL` steps.
        placement: the mesh; each device has the whole SAE, and its share of the minibatches.
        progress: restores the state of an interrupted training, and keeps it after each call.

    Returns:
        (the trained SAE in float32, `sae_metrics` on the held-out activations together with
        `dead_fraction`, the share of the latents that are dead at the end).

    Raises:
        DivergedError: training diverged.
    """
    rng = np.random.default_rng(options.seed)
    graphdef, optimizer, state = _start(sae, train, rng, options=options, placement=placement)
    done, state = progress.restore("sae", state)
    loss = progress.rows[-1]["loss"] if done else 0.0
    batches = _batches(train, rng, done=done, options=options, placement=placement)
    upcoming = next(batches, None)
    with (
        tqdm(total=options.steps, initial=done, desc="SAE", unit="step") as bar,
        progress.running(),
    ):
        while upcoming is not None:
            steps, x_sbd = upcoming
            state, losses_s = _sae_steps(
                graphdef, optimizer, options=options, placement=placement, state=state, x_sbd=x_sbd
            )
            upcoming = next(batches, None)  # is read while the device computes
            loss, dead = float(losses_s.mean()), _dead_fraction(state, options)
            check_loss(loss, "the SAE's loss", options.rate_option)
            log({"stage": "sae", "step": steps, "loss": loss, "dead_fraction": dead})
            bar.update(len(losses_s))
            bar.set_postfix(loss=f"{loss:.3f}", dead=f"{dead:.3f}")
            progress.keep("sae", steps, state)
    check_loss(loss, "the SAE's loss", options.rate_option, LARGEST_LOSS)
    trained = nnx.merge(graphdef, state[0])
    check_weights(trained, options.rate_option)
    metrics = sae_metrics(trained, held_out)
    return trained, {**metrics, "dead_fraction": _dead_fraction(state, options)}


def _batches(
    train: Activations,
    rng: np.random.Generator,
    *,
    done: int,
    options: SAETraining,
    placement: Placement,
) -> Iterator[tuple[int, Any]]:
    """Reads the minibatches `[S, B, D]` of each call; a process reads its share of them.

    Yields:
        (the number of steps after the call, its minibatches), for the steps that are not done. Of
        the others only the random numbers are drawn.
    """
    for start in range(0, options.steps, STEPS_PER_CALL):
        steps = min(STEPS_PER_CALL, options.steps - start)
        n_sb = sample_batches(train.pooled_n, (steps, options.batch_tokens), rng)
        if start < done:
            continue
        with raising_on_all():
            x_sbd = placement.read_rows(
                (*n_sb.shape, train.x_nd.shape[1]),
                partial(_read_region, train, n_sb),
                dimension=1,
            )
        yield start + steps, x_sbd


def _read_region(train: Activations, n_sb: np.ndarray, region: tuple[slice, ...]) -> np.ndarray:
    """Reads a region of the minibatches `[S, B, D]` with the row numbers `n_sb`, at full width."""
    return train.x_nd[n_sb[region[:2]]]


def _start(sae, train, rng, *, options, placement):
    """Returns (structure, optimizer, (parameters, its state, idle steps of each latent `[M]`))."""
    new = initialise(sae, train, rng)
    new.placement = placement
    graphdef, params = nnx.split(new)
    optimizer = _optimizer(options)
    params = placement.replicated(params)
    idle_f = jnp.zeros((sae.config.latent_size,), jnp.int32)
    return graphdef, optimizer, (params, *placement.replicated((optimizer.init(params), idle_f)))


def _optimizer(options: SAETraining) -> optax.GradientTransformation:
    schedule = warmup_cosine(options.learning_rate, options.warmup_fraction, options.steps)
    return optax.adam(schedule)


def lower_steps(sae: SAE, options: SAETraining) -> Lowered:
    """Lowers the program of `pretrain_sae`, `STEPS_PER_CALL` steps, from shapes alone.

    Args:
        sae: the SAE, of descriptions of arrays, with its placement.
        options: options of the training.
    """
    placement, optimizer = sae.placement, _optimizer(options)
    graphdef, params = nnx.split(sae)
    idle_f = jax.ShapeDtypeStruct((sae.config.latent_size,), jnp.int32)
    state = params, jax.eval_shape(optimizer.init, params), idle_f
    steps = min(STEPS_PER_CALL, options.steps)
    shape = steps, options.batch_tokens, sae.config.hidden_size
    return _sae_steps.lower(
        graphdef,
        optimizer,
        options=options,
        placement=placement,
        state=placement.abstract_replicated(state),
        x_sbd=placement.abstract_rows(shape, jnp.float32, dimension=1),
    )


def _dead_fraction(state, options):
    """Returns the share of the latents that are dead in a state of `_start`."""
    *_, idle_f = state
    return float((idle_f >= options.dead_after_steps).mean())


def sample_batches(
    pooled_n: np.ndarray, shape: tuple[int, int], rng: np.random.Generator
) -> np.ndarray:
    """Samples row numbers of activations, `POOLED_FRACTION` of them from the pooled tokens."""
    any_token, pooled = rng.integers(len(pooled_n), size=shape), np.flatnonzero(pooled_n)
    return np.where(rng.random(shape) < POOLED_FRACTION, rng.choice(pooled, shape), any_token)


def initialise(sae: SAE, train: Activations, rng: np.random.Generator) -> SAE:
    """Makes a float32 SAE of the shape of `sae`, initialised as the module describes.

    Raises:
        InputError: the activations are all equal, so that there is nothing to reconstruct.
    """
    if all_equal(train.x_nd):
        raise InputError(
            f"the states of the {len(train.x_nd)} tokens that the SAE would learn from are all "
            "equal (is the model trained?)"
        )
    graphdef, state = nnx.split(sae)
    new = nnx.merge(graphdef, jax.tree.map(lambda p: jnp.array(p, jnp.float32), state))
    directions_fd = rng.standard_normal(new.decoder.shape, np.float32)
    directions_fd /= np.linalg.norm(directions_fd, axis=1, keepdims=True)
    bias_d = mean_row(train.pooled)
    new.decoder[...] = jnp.asarray(directions_fd)
    new.encoder[...] = jnp.asarray(directions_fd.T)
    new.pre_bias[...] = jnp.asarray(bias_d)
    new.latent_bias[...] = jnp.zeros_like(new.latent_bias[...])
    x_bd = read_rows(train.x_nd, rng.integers(len(train.x_nd), size=1024))
    x_hat_bd, _ = reconstruct(new, x_bd)
    centred_bd, output_bd = x_bd - bias_d, x_hat_bd - bias_d
    scale = (centred_bd * output_bd).sum() / np.square(output_bd).sum()
    new.encoder[...] = new.encoder[...] * scale
    return new


@partial(
    jax.jit,
    static_argnames=("graphdef", "optimizer", "options", "placement"),
    donate_argnames="state",
)
def _sae_steps(graphdef, optimizer, options, placement, state, x_sbd):
    """Makes one optimizer step on each minibatch of `[S, B, D]`.

    Returns:
        ((parameters, optimizer state, steps `[M]` since each latent fired), reconstruction losses
        `[S]`).
    """

    def step(carry, x_bd):
        params, opt_state, idle_f = carry
        dead_f, x_bd = idle_f >= options.dead_after_steps, placement.constrain_rows(x_bd)

        def loss_fn(params):
            return sae_loss(nnx.merge(graphdef, params), x_bd, dead_f=dead_f, options=options)

        grads, (loss, fired_f) = jax.grad(loss_fn, has_aux=True)(params)
        grads["decoder"] = jax.tree.map(remove_parallel, grads["decoder"], params["decoder"])
        updates, opt_state = optimizer.update(grads, opt_state)
        params = optax.apply_updates(params, updates)
        params["decoder"] = jax.tree.map(unit_rows, params["decoder"])
        carry = params, opt_state, jnp.where(fired_f, 0, idle_f + 1)
        return placement.constrain_replicated(carry), loss

    return jax.lax.scan(step, state, x_sbd)


def sae_loss(
    sae: SAE, x_bd: jax.Array, dead_f: jax.Array, options: SAETraining
) -> tuple[jax.Array, tuple[jax.Array, jax.Array]]:
    """Computes the loss on a minibatch `[B, D]`; `dead_f` `[M]` marks the dead latents.

    Returns:
        (loss with the auxiliary term, (reconstruction loss, which latents fired `[M]`)).
    """
    a_bf = sae.pre_activations(x_bd)
    z_bf = sae.reconstructing(a_bf)
    x_hat_bd = sae.decode(z_bf)
    loss = reconstruction_loss(x_bd, x_hat_bd).mean()
    residual_bd = jax.lax.stop_gradient(x_bd - x_hat_bd)

    def revive(a_bf):
        # Live latents rank below every dead one. If they are among the k largest nevertheless,
        # `where` removes them.
        lowest = jnp.finfo(a_bf.dtype).min
        dead_bf, aux_k = jnp.where(dead_f, a_bf, lowest), min(options.aux_k, a_bf.shape[1])
        kept_bf = top_k(dead_bf, aux_k, sae.placement)
        e_hat_bd = sae.decode(jnp.where(dead_f, kept_bf, 0.0)) - sae.pre_bias[...]
        return reconstruction_loss(residual_bd, e_hat_bd).mean()

    auxiliary = jax.lax.cond(dead_f.any(), revive, lambda _: jnp.float32(0), a_bf)
    fired_f = (z_bf != 0).any(axis=0)
    return loss + options.aux_weight * auxiliary, (loss, fired_f)


def remove_parallel(gradient_fd: jax.Array, decoder_fd: jax.Array) -> jax.Array:
    """Removes the component along each unit row, which would only change the row's length."""
    along_f1 = (gradient_fd * decoder_fd).sum(axis=1, keepdims=True)
    return gradient_fd - along_f1 * decoder_fd


def unit_rows(decoder_fd: jax.Array) -> jax.Array:
    """Scales rows to length 1."""
    return decoder_fd / jnp.linalg.norm(decoder_fd, axis=1, keepdims=True)


def sae_metrics(sae: SAE, activations: Activations) -> dict[str, float | None]:
    """Measures an SAE on activations.

    Returns:
        `explained_variance` of all tokens, `explained_variance_pooled` of the pooled tokens (None
        if it is undefined), and `l0`, the mean number of kept latents of a token that are not 0.
    """
    every, pooled = (_Explained.of(x_nd) for x_nd in (activations.x_nd, activations.pooled))
    start, active = 0, 0.0
    for x_kd in pieces(activations.x_nd):
        x_hat_kd, kept = reconstruct(sae, x_kd)
        pooled_k = activations.pooled_n[start : start + len(x_kd)]
        every.add(x_kd, x_hat_kd)
        pooled.add(x_kd[pooled_k], x_hat_kd[pooled_k])
        start, active = start + len(x_kd), active + kept
    return {
        "explained_variance": every.variance(),
        "explained_variance_pooled": pooled.variance(),
        "l0": active / start,
    }


def explained_variance(x_nd: np.ndarray, x_hat_nd: np.ndarray) -> float | None:
    """Computes 1 − Σ‖x − x̂‖² / Σ‖x − mean(x)‖²; 0 is as good as the mean of the rows.

    It is undefined, None, if the rows are equal up to rounding.
    """
    sums = _Explained(x_nd.mean(axis=0), bool(is_constant(x_nd, axis=0).all()))
    sums.add(x_nd, x_hat_nd)
    return sums.variance()


class _Explained:
    """The sums of an explained variance, of which it gets some rows at a time.

    Args:
        mean_d: the mean of all rows.
        undefined: True if the rows are equal up to rounding.
    """

    def __init__(self, mean_d: np.ndarray, undefined: bool):
        self._mean_d, self._undefined = mean_d, undefined
        self._unexplained, self._total = np.float64(0), np.float64(0)

    @classmethod
    def of(cls, x_nd: Rows) -> "_Explained":
        """Starts the sums for rows, which are read for their mean."""
        return cls(mean_row(x_nd), all_equal(x_nd))

    def add(self, x_kd: np.ndarray, x_hat_kd: np.ndarray) -> None:
        """Adds rows and their reconstructions."""
        self._unexplained += np.square(x_kd - x_hat_kd, dtype=np.float64).sum()
        self._total += np.square(x_kd - self._mean_d, dtype=np.float64).sum()

    def variance(self) -> float | None:
        """Returns the explained variance of all rows; None if it is undefined."""
        return None if self._undefined else float(1 - self._unexplained / self._total)


def reconstruct(sae: SAE, x_nd: np.ndarray, batch: int = BLOCK) -> tuple[np.ndarray, float]:
    """Reconstructs activations through the k kept latents.

    Returns:
        (x̂ `[N, D]`, the number of kept latents of all tokens that are not 0).
    """
    graphdef, state = nnx.split(sae)
    x_hat_nd, active = np.empty(x_nd.shape, np.float32), 0.0
    for start in range(0, len(x_nd), batch):
        x_bd = x_nd[start : start + batch]
        padded = np.pad(x_bd, ((0, batch - len(x_bd)), (0, 0)))
        x_hat_bd, active_b = fetch(_reconstruct(graphdef, state, padded))
        x_hat_nd[start : start + batch] = x_hat_bd[: len(x_bd)]
        active += float(active_b[: len(x_bd)].sum())
    return x_hat_nd, active


@partial(jax.jit, static_argnums=0)
def _reconstruct(graphdef, state, x_bd):
    """Computes x̂ `[B, D]` and the number of latents `[B]` that are not 0."""
    sae = nnx.merge(graphdef, state)
    z_bf = sae.reconstructing(sae.pre_activations(x_bd))
    return sae.decode(z_bf), (z_bf != 0).sum(axis=1)
