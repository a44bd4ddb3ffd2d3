"""Pretraining a SARM's sparse autoencoder on the activations of its frozen trunk.

    loss = mean_n ‖x̂_n − x_n‖² / ‖x_n‖²  +  w_aux · mean_n ‖ê_n − e_n‖² / ‖e_n‖²

with e = x − x̂ (no gradient) and ê its reconstruction by the `aux_k` strongest *dead* latents:
those that fired for no token of the last `dead_after_steps` batches. The second term brings them
back to life (AuxK). Decoder rows are kept at unit length. Source: Gao et al. 2406.04093.

The activations are those of the last assistant turn, which the SARM's reconstruction loss is
masked to. Its head reads one token of the turn only, so explained variance is also reported on
these pooled tokens alone, about their own mean.

The decoder starts at random directions and the encoder at its transpose, scaled so that the first
reconstructions have the right length.

Deliberate deviations: a fixed share of each minibatch are pooled tokens, and `pre_bias` starts at
their mean (Gao: at the geometric median of all). Pooled states lie in a small cloud far from the
rest; so the k latents need not be spent on the way to it, and the cloud itself is reconstructed
far better.
"""

import dataclasses
from collections.abc import Callable, Sequence
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
from flax import nnx
from tqdm import tqdm

from sarm_jax.models.chat import pad_batch, scored_length
from sarm_jax.models.llama import Llama
from sarm_jax.models.sae import SAE, reconstruction_loss, standardise, top_k
from sarm_jax.parallel.compilation import compile_programs

Log = Callable[[dict[str, Any]], None]
TOKENS_PER_BATCH = 2048  # of the trunk's forward pass
STEPS_PER_CALL = 20  # minibatches that are on the device at a time
POOLED_FRACTION = 0.5  # of a minibatch; a random one would hold a few per cent


@dataclasses.dataclass(frozen=True)
class SAETraining:
    """`batch_tokens` activations per step; `dead_after_steps` steps without firing is dead."""

    steps: int
    batch_tokens: int
    learning_rate: float
    warmup_fraction: float
    dead_after_steps: int
    aux_k: int
    aux_weight: float
    seed: int


@dataclasses.dataclass(frozen=True)
class Conversation:
    """Token ids of an exchange, of which the last `turn_length` are the assistant's turn."""

    ids: list[int]
    turn_length: int


@dataclasses.dataclass(frozen=True)
class Activations:
    """Standardised trunk states `x_nd [N, D]` float32, in the order of the conversations.

    `pooled_n [N]` bool marks the last token of each conversation, which the head reads.
    """

    x_nd: np.ndarray
    pooled_n: np.ndarray

    @property
    def pooled_rd(self) -> np.ndarray:
        """The pooled states, one per conversation `[R, D]`."""
        return self.x_nd[self.pooled_n]


def collect_activations(
    trunk: Llama, rows: Sequence[Conversation], most: int, seed: int
) -> Activations:
    """Runs the trunk and keeps the states of the assistant turns' tokens.

    Every pooled token is kept; the others are sampled without replacement, so that N ≤ `most`
    (or N = the number of rows, where that is more).
    """
    kept = _sample_tokens([row.turn_length for row in rows], most, np.random.default_rng(seed))
    offsets = np.concatenate([[0], np.cumsum([len(k) for k in kept])])
    x_nd = np.empty((offsets[-1], trunk.config.hidden_size), np.float32)
    graphdef, state = nnx.split(trunk)
    length_r = np.asarray([scored_length(len(row.ids)) for row in rows])
    size_of = {length: max(TOKENS_PER_BATCH // length, 1) for length in np.unique(length_r)}
    shapes = [pad_batch([[0]] * size, length, 0) for length, size in size_of.items()]
    compile_programs(partial(_standardised.lower, graphdef, state, *shape) for shape in shapes)
    with tqdm(total=len(rows), desc="activations", unit="row") as bar:
        for length, size in size_of.items():
            same = np.flatnonzero(length_r == length)
            for start in range(0, len(same), size):
                chosen = same[start : start + size]
                ids = [rows[i].ids for i in chosen]
                ids += [ids[0]] * (size - len(ids))
                x_btd = np.asarray(_standardised(graphdef, state, *pad_batch(ids, length, 0)))
                for x_td, i in zip(x_btd, chosen, strict=False):
                    x_nd[offsets[i] : offsets[i + 1]] = x_td[len(rows[i].ids) - 1 - kept[i]]
                bar.update(len(chosen))
    pooled_n = np.zeros(len(x_nd), bool)
    pooled_n[offsets[1:] - 1] = True
    return Activations(x_nd, pooled_n)


@partial(jax.jit, static_argnums=0)
def _standardised(graphdef, state, tokens_bt, mask_bt):
    return standardise(nnx.merge(graphdef, state).hidden(tokens_bt, mask_bt))


def _sample_tokens(turn_lengths, most, rng):
    """Per row the kept tokens, counted from the end (0 is the pooled one), in reading order."""
    others_r = np.asarray(turn_lengths) - 1
    end_r = np.cumsum(others_r)
    total, room = int(end_r[-1]), max(most - len(turn_lengths), 0)
    picks = np.arange(total)
    if total > room:
        picks = np.sort(rng.choice(total, room, replace=False))
    row = np.searchsorted(end_r, picks, side="right")
    back = picks - (end_r - others_r)[row] + 1
    per_row = np.split(back, np.searchsorted(row, np.arange(1, len(turn_lengths))))
    return [np.concatenate([k[::-1], [0]]) for k in per_row]


def pretrain_sae(
    sae: SAE, train: Activations, held_out: Activations, options: SAETraining, log: Log
) -> tuple[SAE, dict[str, float]]:
    """Trains a copy of `sae`: (the copy in float32, metrics on the held-out activations).

    Metrics: `explained_variance` and `explained_variance_pooled` (see `explained_variance`), `l0`
    (kept latents that are not 0, per token), and `dead_fraction`, the share of latents that fired
    for no token of the last `dead_after_steps` batches.
    """
    rng = np.random.default_rng(options.seed)
    graphdef, params = nnx.split(initialise(sae, train, rng))
    schedule = warmup_cosine(options.learning_rate, options.warmup_fraction, options.steps)
    optimizer = optax.adam(schedule)
    opt_state = optimizer.init(params)
    idle_f = jnp.zeros((sae.config.latent_size,), jnp.int32)
    bar = tqdm(total=options.steps, desc="SAE", unit="step")
    for start in range(0, options.steps, STEPS_PER_CALL):
        steps = min(STEPS_PER_CALL, options.steps - start)
        n_sb = sample_batches(train.pooled_n, (steps, options.batch_tokens), rng)
        params, opt_state, idle_f, losses = _sae_steps(
            graphdef, optimizer, options, params, opt_state, idle_f, train.x_nd[n_sb]
        )
        loss, dead = float(losses.mean()), float((idle_f >= options.dead_after_steps).mean())
        log({"stage": "sae", "step": start + steps, "loss": loss, "dead_fraction": dead})
        bar.update(steps)
        bar.set_postfix(loss=f"{loss:.3f}", dead=f"{dead:.3f}")
    bar.close()
    trained = nnx.merge(graphdef, params)
    return trained, {
        **sae_metrics(trained, held_out),
        "dead_fraction": float((idle_f >= options.dead_after_steps).mean()),
    }


def sample_batches(
    pooled_n: np.ndarray, shape: tuple[int, int], rng: np.random.Generator
) -> np.ndarray:
    """Row numbers of a `shape` of draws, `POOLED_FRACTION` of them from the pooled tokens."""
    any_token, pooled = rng.integers(len(pooled_n), size=shape), np.flatnonzero(pooled_n)
    return np.where(rng.random(shape) < POOLED_FRACTION, rng.choice(pooled, shape), any_token)


def initialise(sae: SAE, train: Activations, rng: np.random.Generator) -> SAE:
    """A float32 SAE of `sae`'s shape, at the start described at the top of this file."""
    graphdef, state = nnx.split(sae)
    new = nnx.merge(graphdef, jax.tree.map(lambda p: jnp.array(p, jnp.float32), state))
    directions_fd = rng.standard_normal(new.decoder.shape, np.float32)
    directions_fd /= np.linalg.norm(directions_fd, axis=1, keepdims=True)
    bias_d = train.pooled_rd.mean(axis=0)
    new.decoder[...] = jnp.asarray(directions_fd)
    new.encoder[...] = jnp.asarray(directions_fd.T)
    new.pre_bias[...] = jnp.asarray(bias_d)
    new.latent_bias[...] = jnp.zeros_like(new.latent_bias[...])
    x_bd = train.x_nd[rng.integers(len(train.x_nd), size=1024)]
    x_hat_bd, _ = reconstruct(new, x_bd)
    centred_bd, answer_bd = x_bd - bias_d, x_hat_bd - bias_d
    scale = (centred_bd * answer_bd).sum() / np.square(answer_bd).sum()
    new.encoder[...] = new.encoder[...] * scale
    return new


@partial(jax.jit, static_argnums=(0, 1, 2), donate_argnums=(3, 4, 5))
def _sae_steps(graphdef, optimizer, options, params, opt_state, idle_f, x_sbd):
    """One scan over the minibatches `[S, B, D]`; losses `[S]` are those of reconstruction."""

    def step(carry, x_bd):
        params, opt_state, idle_f = carry
        dead_f = idle_f >= options.dead_after_steps

        def loss_fn(params):
            return sae_loss(nnx.merge(graphdef, params), x_bd, dead_f, options)

        grads, (loss, fired_f) = jax.grad(loss_fn, has_aux=True)(params)
        grads["decoder"] = jax.tree.map(remove_parallel, grads["decoder"], params["decoder"])
        updates, opt_state = optimizer.update(grads, opt_state)
        params = optax.apply_updates(params, updates)
        params["decoder"] = jax.tree.map(unit_rows, params["decoder"])
        return (params, opt_state, jnp.where(fired_f, 0, idle_f + 1)), loss

    (params, opt_state, idle_f), losses_s = jax.lax.scan(step, (params, opt_state, idle_f), x_sbd)
    return params, opt_state, idle_f, losses_s


def sae_loss(
    sae: SAE, x_bd: jax.Array, dead_f: jax.Array, options: SAETraining
) -> tuple[jax.Array, tuple[jax.Array, jax.Array]]:
    """(loss with the auxiliary term, (reconstruction loss alone, which latents fired `[M]`))."""
    a_bf = sae.pre_activations(x_bd)
    z_bf = top_k(a_bf, sae.config.k)
    x_hat_bd = sae.decode(z_bf)
    loss = reconstruction_loss(x_bd, x_hat_bd).mean()
    residual_bd = jax.lax.stop_gradient(x_bd - x_hat_bd)

    def revive(a_bf):
        # Dead latents first: everything else is below the k-th largest, or cut off here.
        lowest = jnp.finfo(a_bf.dtype).min
        kept_bf = top_k(jnp.where(dead_f, a_bf, lowest), min(options.aux_k, a_bf.shape[1]))
        e_hat_bd = sae.decode(jnp.where(dead_f, kept_bf, 0.0)) - sae.pre_bias[...]
        return reconstruction_loss(residual_bd, e_hat_bd).mean()

    auxiliary = jax.lax.cond(dead_f.any(), revive, lambda _: jnp.float32(0), a_bf)
    fired_f = (z_bf != 0).any(axis=0)
    return loss + options.aux_weight * auxiliary, (loss, fired_f)


def remove_parallel(gradient_fd: jax.Array, decoder_fd: jax.Array) -> jax.Array:
    """The gradient without its component along each (unit) row, which only changes the length."""
    along_f1 = (gradient_fd * decoder_fd).sum(axis=1, keepdims=True)
    return gradient_fd - along_f1 * decoder_fd


def unit_rows(decoder_fd: jax.Array) -> jax.Array:
    """Rows scaled to length 1."""
    return decoder_fd / jnp.linalg.norm(decoder_fd, axis=1, keepdims=True)


def warmup_cosine(peak: float, warmup_fraction: float, steps: int) -> optax.Schedule:
    """A linear warm-up over the first `warmup_fraction` of `steps` updates, then a cosine to 0.

    Its first update has rate 0, so that there is none where it would be a single one.
    """
    warmup = round(warmup_fraction * steps)
    if warmup < 2:
        return optax.cosine_decay_schedule(peak, steps)
    return optax.warmup_cosine_decay_schedule(0.0, peak, warmup, max(steps, warmup + 1))


def sae_metrics(sae: SAE, activations: Activations) -> dict[str, float]:
    """`explained_variance` of all tokens and of the pooled ones, and `l0`."""
    x_hat_nd, l0 = reconstruct(sae, activations.x_nd)
    pooled_n = activations.pooled_n
    return {
        "explained_variance": explained_variance(activations.x_nd, x_hat_nd),
        "explained_variance_pooled": explained_variance(activations.pooled_rd, x_hat_nd[pooled_n]),
        "l0": l0,
    }


def explained_variance(x_nd: np.ndarray, x_hat_nd: np.ndarray) -> float:
    """1 − Σ‖x − x̂‖² / Σ‖x − mean(x)‖²: 0 is no better than the mean of these very rows."""
    unexplained = np.square(x_nd - x_hat_nd, dtype=np.float64).sum()
    total = np.square(x_nd - x_nd.mean(axis=0), dtype=np.float64).sum()
    return float(1 - unexplained / total)


def reconstruct(sae: SAE, x_nd: np.ndarray, batch: int = 1024) -> tuple[np.ndarray, float]:
    """(x̂ `[N, D]` through the k kept latents, how many of these are not 0 per token)."""
    graphdef, state = nnx.split(sae)
    x_hat_nd, active = np.empty(x_nd.shape, np.float32), 0.0
    for start in range(0, len(x_nd), batch):
        x_bd = x_nd[start : start + batch]
        padded = np.pad(x_bd, ((0, batch - len(x_bd)), (0, 0)))
        x_hat_bd, active_b = _reconstruct(graphdef, state, padded)
        x_hat_nd[start : start + batch] = np.asarray(x_hat_bd)[: len(x_bd)]
        active += float(np.asarray(active_b)[: len(x_bd)].sum())
    return x_hat_nd, active / len(x_nd)


@partial(jax.jit, static_argnums=0)
def _reconstruct(graphdef, state, x_bd):
    sae = nnx.merge(graphdef, state)
    z_bf = top_k(sae.pre_activations(x_bd), sae.config.k)
    return sae.decode(z_bf), (z_bf != 0).sum(axis=1)
