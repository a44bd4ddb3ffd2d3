"""Training of one head, or of an ensemble of heads, on a frozen SAE and frozen states (mode 0)."""

from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
from flax import nnx
from jax.stages import Lowered

from sarm_jax.models.sae import SAE
from sarm_jax.parallel.processes import fetch
from sarm_jax.parallel.sharding import ONE_DEVICE, Placement
from sarm_jax.training.activations import Rows, read_rows
from sarm_jax.training.divergence import check_loss
from sarm_jax.training.preference_loss import bradley_terry_loss, pair_metrics
from sarm_jax.training.preference_training import (
    HEAD_RATE,
    PreferenceTraining,
    adamw,
    defined_mean,
)
from sarm_jax.training.progress import Log


def train_head(
    sae: SAE,
    pooled_rd: Rows,
    pairs_p2: np.ndarray,
    options: PreferenceTraining,
    log: Log,
    tie_p: np.ndarray | None = None,
    placement: Placement = ONE_DEVICE,
) -> jax.Array:
    """Trains the head on a frozen SAE and frozen pooled states (mode 0).

    Only the kept latents of each row are stored. On a mesh every device has them all, and its share
    of each batch of pairs; a batch that the devices do not divide is not shared.

    Args:
        sae: the SAE.
        pooled_rd: standardised pooled states `[R, D]`.
        pairs_p2: row numbers (chosen, rejected) of each pair.
        options: options of the training.
        log: receives a metrics row after each epoch.
        tie_p: which pairs are ties; None if none is.
        placement: the mesh that the SAE is on.

    Returns:
        Head weights `[M]`.

    Raises:
        DivergedError: training diverged.
    """
    return _train_head(
        sparse_latents(sae, pooled_rd, placement),
        sae.config.latent_size,
        pairs_p2=pairs_p2,
        options=options,
        log=log,
        tie_p=tie_p,
        placement=placement,
    )


def train_heads(
    sae: SAE,
    pooled_rd: Rows,
    pairs_p2: np.ndarray,
    options: PreferenceTraining,
    log: Log,
    heads: int,
    tie_p: np.ndarray | None = None,
    placement: Placement = ONE_DEVICE,
) -> jax.Array:
    """Trains an ensemble of heads, each as `train_head` does on its own `resampled_pairs`.

    A row of the log has the number of its head under "head". `heads` is the number H of heads; all
    other arguments are those of `train_head`.

    Returns:
        Head weights `[H, M]`.

    Raises:
        DivergedError: training diverged.
    """
    latents, weights = sparse_latents(sae, pooled_rd, placement), []
    for head in range(heads):
        drawn_p = resampled_pairs(len(pairs_p2), options.seed, head)
        rows: list[dict[str, Any]] = []
        weights.append(
            _train_head(
                latents,
                sae.config.latent_size,
                pairs_p2=pairs_p2[drawn_p],
                options=options,
                log=rows.append,
                tie_p=None if tie_p is None else tie_p[drawn_p],
                placement=placement,
            )
        )
        for row in rows:
            log({**row, "head": head})
    return jnp.stack(weights)


def resampled_pairs(count: int, seed: int, head: int) -> np.ndarray:
    """Draws as many of `count` pairs as there are, with replacement, for one head (bootstrap)."""
    return np.random.default_rng([seed, head]).integers(count, size=count)


def _train_head(
    latents: tuple[jax.Array, jax.Array],
    latent_size: int,
    *,
    pairs_p2: np.ndarray,
    options: PreferenceTraining,
    log: Log,
    tie_p: np.ndarray | None,
    placement: Placement,
) -> jax.Array:
    """Trains a head on `sparse_latents`, see `train_head`."""
    values_rk, indices_rk = latents
    rng = np.random.default_rng(options.seed)
    batch = min(options.batch_size, len(pairs_p2))
    per_epoch = len(pairs_p2) // batch
    order = [rng.permutation(len(pairs_p2))[: per_epoch * batch] for _ in range(options.epochs)]
    order_sb = np.reshape(order, (options.epochs * per_epoch, batch))
    optimizer = adamw(options.head_learning_rate, options, len(order_sb))
    weights_m, metrics = _head_steps(
        optimizer,
        values_rk,
        indices_rk,
        pairs_sb2=placement.rows(jnp.asarray(pairs_p2[order_sb]), dimension=1),
        tie_sb=placement.rows(None if tie_p is None else jnp.asarray(tie_p[order_sb]), dimension=1),
        tie_weight=options.tie_weight,
        latent_size=latent_size,
    )
    by_epoch = {name: m.reshape(options.epochs, -1) for name, m in fetch(metrics).items()}
    for epoch, loss in enumerate(by_epoch.pop("loss").mean(1)):
        check_loss(float(loss), "the head's Bradley-Terry loss", HEAD_RATE)
        means = {name: defined_mean(value_es[epoch]) for name, value_es in by_epoch.items()}
        log({"stage": "head", "step": (epoch + 1) * per_epoch, "loss": float(loss), **means})
    check_loss(float(loss), "the head's Bradley-Terry loss", HEAD_RATE, options.largest_loss)
    return weights_m


def kept_latents(sae: SAE) -> int:
    """Returns how many latents of a row are stored: k with TopK, otherwise all M."""
    return sae.config.k if sae.config.use_topk else sae.config.latent_size


def sparse_latents(
    sae: SAE, x_rd: Rows, placement: Placement = ONE_DEVICE, batch: int = 256
) -> tuple[jax.Array, jax.Array]:
    """Computes the latents that the head reads: k of each row with TopK, otherwise all M.

    Returns:
        (values, feature ids), each `[R, k]`, on every device.
    """
    k, (graphdef, state) = kept_latents(sae), nnx.split(sae)
    batches = [
        _sparse_latents(graphdef, state, placement.rows(read_rows(x_rd, rows)), k=k)
        for rows in (slice(start, start + batch) for start in range(0, len(x_rd), batch))
    ]
    values, indices = zip(*batches, strict=True)
    return placement.replicated((jnp.concatenate(values), jnp.concatenate(indices)))


def lower_head_step(sae: SAE, options: PreferenceTraining, pairs: int) -> Lowered:
    """Lowers a step of `train_head` on so many pairs, from shapes alone.

    Args:
        sae: the SAE, of descriptions of arrays, with its placement.
        options: options of the training.
        pairs: the pairs whose latents every device has.
    """
    placement, latents = sae.placement, (2 * pairs, kept_latents(sae))
    values_rk, indices_rk = placement.abstract_replicated(
        tuple(jax.ShapeDtypeStruct(latents, dtype) for dtype in (jnp.float32, jnp.int32))
    )
    return _head_steps.lower(
        adamw(options.head_learning_rate, options, 2),
        values_rk,
        indices_rk,
        pairs_sb2=placement.abstract_rows((1, min(options.batch_size, pairs), 2), jnp.int32, 1),
        tie_sb=None,
        tie_weight=options.tie_weight,
        latent_size=sae.config.latent_size,
    )


@partial(jax.jit, static_argnames=("graphdef", "k"))
def _sparse_latents(graphdef, state, x_bd, k):
    """Computes the k largest pre-activations of each row, and their feature ids."""
    return jax.lax.top_k(nnx.merge(graphdef, state).pre_activations(x_bd), k)


@partial(jax.jit, static_argnames=("optimizer", "tie_weight", "latent_size"))
def _head_steps(optimizer, values_rk, indices_rk, pairs_sb2, tie_sb, tie_weight, latent_size):
    """Trains a head from 0 in one scan over the batches of pairs `[S, B, 2]`."""

    def step(carry, batch):
        (weights_m, opt_state), (pairs_b2, tie_b) = carry, batch

        def loss_fn(weights_m):
            score_b2 = (weights_m[indices_rk[pairs_b2]] * values_rk[pairs_b2]).sum(-1)
            chosen_b, rejected_b = score_b2[:, 0], score_b2[:, 1]
            loss = bradley_terry_loss(chosen_b, rejected_b, tie_b, tie_weight)
            return loss, pair_metrics(chosen_b, rejected_b, tie_b)

        (loss, metrics), gradient_m = jax.value_and_grad(loss_fn, has_aux=True)(weights_m)
        updates, opt_state = optimizer.update(gradient_m, opt_state, weights_m)
        return (optax.apply_updates(weights_m, updates), opt_state), {"loss": loss, **metrics}

    weights_m = jnp.zeros((latent_size,), jnp.float32)
    carry, batches = (weights_m, optimizer.init(weights_m)), (pairs_sb2, tie_sb)
    (weights_m, _), metrics = jax.lax.scan(step, carry, batches)
    return weights_m, metrics
