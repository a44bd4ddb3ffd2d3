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
from collections.abc import Callable, Sequence
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
from flax import nnx
from tqdm import tqdm

from sarm_jax.io.errors import InputError
from sarm_jax.models.chat import pad_batch, scored_length
from sarm_jax.models.llama import Llama
from sarm_jax.models.sae import SAE, reconstruction_loss, standardise, top_k
from sarm_jax.parallel.compilation import compile_programs
from sarm_jax.parallel.finite import require_finite
from sarm_jax.parallel.processes import fetch
from sarm_jax.parallel.sharding import ONE_DEVICE, Placement
from sarm_jax.reporting.spread import is_constant
from sarm_jax.training.divergence import check_loss, check_weights
from sarm_jax.training.progress import NOTHING_KEPT, Progress

Log = Callable[[dict[str, Any]], None]
TOKENS_PER_BATCH = 2048  # in one forward pass of the trunk
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


@dataclasses.dataclass(frozen=True)
class Conversation:
    """The token ids of an exchange; the last `turn_length` of them are the assistant turn."""

    ids: list[int]
    turn_length: int


@dataclasses.dataclass(frozen=True)
class Activations:
    """Trunk states of tokens, standardised for a SARM, in the order of the conversations.

    Attributes:
        x_nd: states `[N, D]` float32.
        pooled_n: `[N]` bool, True for the last token of each conversation, which the head reads.
    """

    x_nd: np.ndarray
    pooled_n: np.ndarray

    @property
    def pooled_rd(self) -> np.ndarray:
        """The pooled states `[R, D]`, one of each conversation."""
        return self.x_nd[self.pooled_n]


def collect_activations(
    trunk: Llama,
    rows: Sequence[Conversation],
    max_tokens: int,
    seed: int,
    standardised: bool = True,
) -> Activations:
    """Runs the trunk, on its mesh, and keeps the states of tokens of the assistant turns.

    With `standardised` False they are kept as they are.

    Every pooled token is kept. The other tokens are sampled without replacement, up to `max_tokens`
    tokens in all; if there are more conversations than that, only the pooled tokens are kept.

    Raises:
        InputError: a state is not finite.
    """
    rng = np.random.default_rng(seed)
    kept = _sample_tokens([row.turn_length for row in rows], max_tokens, rng)
    offsets = np.concatenate([[0], np.cumsum([len(k) for k in kept])])
    x_nd = np.empty((offsets[-1], trunk.config.hidden_size), np.float32)
    graphdef, state = nnx.split(trunk)
    placement = trunk.placement
    states = _standardised if standardised else _states
    length_r = np.asarray([scored_length(len(row.ids)) for row in rows])
    batch_sizes = {n: _divisible(TOKENS_PER_BATCH // n, placement) for n in np.unique(length_r)}
    examples = [
        placement.rows(pad_batch([[0]] * size, length, 0)) for length, size in batch_sizes.items()
    ]
    compile_programs(
        partial(states.lower, graphdef, state, tokens_bt, mask_bt)
        for tokens_bt, mask_bt in examples
    )
    with tqdm(total=len(rows), desc="activations", unit="row") as bar:
        for length, size in batch_sizes.items():
            indices = np.flatnonzero(length_r == length)
            for start in range(0, len(indices), size):
                batch = indices[start : start + size]
                ids = [rows[i].ids for i in batch]
                ids += [ids[0]] * (size - len(ids))
                tokens_bt, mask_bt = placement.rows(pad_batch(ids, length, 0))
                x_btd = np.asarray(fetch(states(graphdef, state, tokens_bt, mask_bt)))
                for x_td, i in zip(x_btd, batch, strict=False):
                    x_nd[offsets[i] : offsets[i + 1]] = x_td[len(rows[i].ids) - 1 - kept[i]]
                bar.update(len(batch))
    pooled_n = np.zeros(len(x_nd), bool)
    pooled_n[offsets[1:] - 1] = True
    require_finite(
        {
            "the states of its layers"
            if not standardised
            else "the states of the first layers": x_nd
        },
        "the model",
    )
    return Activations(x_nd, pooled_n)


def _divisible(rows: int, placement: Placement) -> int:
    """Rounds up to a positive number of rows that the mesh divides."""
    return max(-(-rows // placement.parts), 1) * placement.parts


@partial(jax.jit, static_argnums=0)
def _standardised(graphdef, state, tokens_bt, mask_bt):
    """Computes the standardised trunk states `[B, T, D]` of a padded batch."""
    return standardise(nnx.merge(graphdef, state).hidden(tokens_bt, mask_bt))


@partial(jax.jit, static_argnums=0)
def _states(graphdef, state, tokens_bt, mask_bt):
    """Computes the trunk states `[B, T, D]` of a padded batch in float32."""
    return nnx.merge(graphdef, state).hidden(tokens_bt, mask_bt).astype(jnp.float32)


def _sample_tokens(turn_lengths, max_tokens, rng):
    """Samples the tokens to keep of each turn.

    Returns:
        For each turn the kept tokens in reading order, counted from the end: 0 is the pooled one.
    """
    others_r = np.asarray(turn_lengths) - 1
    end_r = np.cumsum(others_r)
    total, room = int(end_r[-1]), max(max_tokens - len(turn_lengths), 0)
    sample = np.arange(total)
    if total > room:
        sample = np.sort(rng.choice(total, room, replace=False))
    row = np.searchsorted(end_r, sample, side="right")
    back = sample - (end_r - others_r)[row] + 1
    per_row = np.split(back, np.searchsorted(row, np.arange(1, len(turn_lengths))))
    return [np.concatenate([k[::-1], [0]]) for k in per_row]


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
        sae: gives the shape of the SAE.
        train: activations to train on.
        held_out: activations of the metrics.
        options: options of the training.
        log: receives a metrics row every `STEPS_PER_CALL` steps.
        placement: the mesh; each device has the whole SAE, and its share of the minibatches.
        progress: where the training goes on, and what is kept of it.

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
    with (
        tqdm(total=options.steps, initial=done, desc="SAE", unit="step") as bar,
        progress.running(),
    ):
        for start in range(0, options.steps, STEPS_PER_CALL):
            steps = min(STEPS_PER_CALL, options.steps - start)
            n_sb = sample_batches(train.pooled_n, (steps, options.batch_tokens), rng)
            if start < done:  # only the random numbers are those of the steps before
                continue
            state, losses_s = _sae_steps(
                graphdef,
                optimizer,
                options=options,
                placement=placement,
                state=state,
                x_sbd=placement.rows(train.x_nd[n_sb], dimension=1),
            )
            loss, dead = float(losses_s.mean()), _dead_fraction(state, options)
            check_loss(loss, "the SAE's loss", options.rate_option)
            log({"stage": "sae", "step": start + steps, "loss": loss, "dead_fraction": dead})
            bar.update(steps)
            bar.set_postfix(loss=f"{loss:.3f}", dead=f"{dead:.3f}")
            progress.keep("sae", start + steps, state)
    check_loss(loss, "the SAE's loss", options.rate_option, LARGEST_LOSS)
    trained = nnx.merge(graphdef, state[0])
    check_weights(trained, options.rate_option)
    metrics = sae_metrics(trained, held_out)
    return trained, {**metrics, "dead_fraction": _dead_fraction(state, options)}


def _start(sae, train, rng, *, options, placement):
    """Returns (structure, optimizer, (parameters, its state, idle steps of each latent `[M]`))."""
    new = initialise(sae, train, rng)
    new.placement = placement
    graphdef, params = nnx.split(new)
    schedule = warmup_cosine(options.learning_rate, options.warmup_fraction, options.steps)
    optimizer = optax.adam(schedule)
    params = placement.replicated(params)
    idle_f = jnp.zeros((sae.config.latent_size,), jnp.int32)
    return graphdef, optimizer, (params, *placement.replicated((optimizer.init(params), idle_f)))


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
    if is_constant(train.x_nd, axis=0).all():
        raise InputError(
            f"the states of the {len(train.x_nd)} tokens that the SAE would learn from are all "
            "equal (is the model trained?)"
        )
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


def warmup_cosine(peak: float, warmup_fraction: float, steps: int) -> optax.Schedule:
    """Makes a schedule with a linear warm-up and a cosine decay to 0.

    The warm-up takes the first `warmup_fraction` of `steps` updates. Its first update has rate 0,
    so a warm-up of a single update is left out.
    """
    warmup = round(warmup_fraction * steps)
    if warmup < 2:
        return optax.cosine_decay_schedule(peak, steps)
    return optax.warmup_cosine_decay_schedule(0.0, peak, warmup, max(steps, warmup + 1))


def sae_metrics(sae: SAE, activations: Activations) -> dict[str, float | None]:
    """Measures an SAE on activations.

    Returns:
        `explained_variance` of all tokens, `explained_variance_pooled` of the pooled tokens (None
        if it is undefined), and `l0`, the mean number of kept latents of a token that are not 0.
    """
    x_hat_nd, l0 = reconstruct(sae, activations.x_nd)
    pooled_n = activations.pooled_n
    return {
        "explained_variance": explained_variance(activations.x_nd, x_hat_nd),
        "explained_variance_pooled": explained_variance(activations.pooled_rd, x_hat_nd[pooled_n]),
        "l0": l0,
    }


def explained_variance(x_nd: np.ndarray, x_hat_nd: np.ndarray) -> float | None:
    """Computes 1 − Σ‖x − x̂‖² / Σ‖x − mean(x)‖²; 0 is as good as the mean of the rows.

    It is undefined, None, if the rows are equal up to rounding.
    """
    if is_constant(x_nd, axis=0).all():
        return None
    unexplained = np.square(x_nd - x_hat_nd, dtype=np.float64).sum()
    total = np.square(x_nd - x_nd.mean(axis=0), dtype=np.float64).sum()
    return float(1 - unexplained / total)


def reconstruct(sae: SAE, x_nd: np.ndarray, batch: int = 1024) -> tuple[np.ndarray, float]:
    """Reconstructs activations through the k kept latents.

    Returns:
        (x̂ `[N, D]`, the mean number of kept latents of a token that are not 0).
    """
    graphdef, state = nnx.split(sae)
    x_hat_nd, active = np.empty(x_nd.shape, np.float32), 0.0
    for start in range(0, len(x_nd), batch):
        x_bd = x_nd[start : start + batch]
        padded = np.pad(x_bd, ((0, batch - len(x_bd)), (0, 0)))
        x_hat_bd, active_b = fetch(_reconstruct(graphdef, state, padded))
        x_hat_nd[start : start + batch] = x_hat_bd[: len(x_bd)]
        active += float(active_b[: len(x_bd)].sum())
    return x_hat_nd, active / len(x_nd)


@partial(jax.jit, static_argnums=0)
def _reconstruct(graphdef, state, x_bd):
    """Computes x̂ `[B, D]` and the number of latents `[B]` that are not 0."""
    sae = nnx.merge(graphdef, state)
    z_bf = sae.reconstructing(sae.pre_activations(x_bd))
    return sae.decode(z_bf), (z_bf != 0).sum(axis=1)
