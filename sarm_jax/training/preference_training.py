"""Bradley–Terry training of a SARM, in the four modes of the reference implementation.

    L_BT = −mean log σ(r_chosen − r_rejected)          (Bradley & Terry 1952; Ouyang 2203.02155)
    L    = L_BT + λ L_rec,      L_rec = mean ‖x̂ − x‖² / ‖x‖² over the last assistant turn

A tie, a pair whose sides are equally good, has the label ½ instead of 1: with Δ the difference of
its scores, it adds weight · (−½ log σ(Δ) − ½ log σ(−Δ)) to the mean, which is least at Δ = 0.

    mode  trunk   SAE            head
    0     frozen  frozen         L_BT     the pooled latents are computed once
    1     L_BT    frozen         L_BT
    2     L       L              L_BT
    3     L_BT    λ L_rec only   L_BT     x is detached in L_rec, the SAE in L_BT

The optimizer is AdamW with a cosine schedule and a 3 % warm-up. Norm scales and SAE biases have no
weight decay. The final norm, which a SARM never applies, is not trained. Source: arXiv 2508.08746.

Deliberate deviation: the head, which starts at 0, has its own learning rate.
"""

import dataclasses
from collections import deque
from collections.abc import Iterator, Mapping, Sequence
from functools import cache, partial
from typing import Any, TypeVar

import chex
import jax
import jax.numpy as jnp
import numpy as np
import optax
from flax import nnx
from tqdm import tqdm

from sarm_jax.models.chat import bucket_length, pad_batch
from sarm_jax.models.sae import SAE, reconstruction_loss, standardise, top_k
from sarm_jax.models.sarm import SARM, last_position
from sarm_jax.training.divergence import check_loss
from sarm_jax.training.sae_training import Conversation, Log, warmup_cosine

T = TypeVar("T", bound=nnx.Module)
HEAD_RATE = "train_sarm.head_learning_rate"
RATES = f"train_sarm.learning_rate or {HEAD_RATE}"
# Equal scores have a Bradley-Terry loss of 0.69, and a reconstruction by 0 has a loss of 1.
LARGEST_LOSS = 10.0
LAST_STEPS = 20  # of which the mean loss is compared with it


@dataclasses.dataclass(frozen=True)
class PreferenceTraining:
    """Options of Bradley–Terry training.

    Attributes:
        mode: 0 to 3, what is trained (see the module).
        reconstruction_weight: λ.
        epochs: passes over the pairs.
        batch_size: pairs per step.
        learning_rate: peak learning rate of trunk and SAE.
        head_learning_rate: peak learning rate of the head.
        warmup_fraction: share of the steps in which the rates rise.
        weight_decay: weight decay of AdamW.
        seed: seed of the order of the pairs.
        tie_weight: weight of a tie in L_BT; a preference has the weight 1.
    """

    mode: int
    reconstruction_weight: float
    epochs: int
    batch_size: int
    learning_rate: float
    head_learning_rate: float
    warmup_fraction: float
    weight_decay: float
    seed: int
    tie_weight: float = 1.0

    @property
    def largest_loss(self) -> float:
        """The mean loss above which training has diverged; ties of a large weight may have more."""
        return LARGEST_LOSS * max(1.0, self.tie_weight)


def bradley_terry_loss(
    score_chosen_b: jax.Array,
    score_rejected_b: jax.Array,
    tie_b: jax.Array | None = None,
    tie_weight: float = 1.0,
) -> jax.Array:
    """Computes L_BT, the mean loss of the pairs; a pair of equal scores adds log 2.

    Args:
        score_chosen_b: scores of the chosen sides.
        score_rejected_b: scores of the rejected sides.
        tie_b: which pairs are ties; None if none is.
        tie_weight: weight of a tie. The sum is divided by the number of pairs, whatever their
            weights, so that a preference counts the same in every batch.
    """
    chex.assert_rank([score_chosen_b, score_rejected_b], 1)
    margin_b = score_chosen_b - score_rejected_b
    if tie_b is None:
        return -jax.nn.log_sigmoid(margin_b).mean()
    tied_b = -(jax.nn.log_sigmoid(margin_b) + jax.nn.log_sigmoid(-margin_b)) / 2
    return jnp.where(tie_b, tie_weight * tied_b, -jax.nn.log_sigmoid(margin_b)).mean()


def accuracy(
    score_chosen_b: jax.Array, score_rejected_b: jax.Array, tie_b: jax.Array | None = None
) -> jax.Array:
    """Computes the share of the preferences that are ranked correctly; equal scores count half.

    It is NaN if every pair is a tie (`tie_b` `[B]`).
    """
    chex.assert_rank([score_chosen_b, score_rejected_b], 1)
    right_b = jnp.sign(score_chosen_b - score_rejected_b) + 1
    if tie_b is None:
        return right_b.mean() / 2
    return right_b.mean(where=~tie_b) / 2


def tie_margin(
    score_chosen_b: jax.Array, score_rejected_b: jax.Array, tie_b: jax.Array
) -> jax.Array:
    """Computes the mean |Δ| of the ties `tie_b` `[B]`; NaN if no pair is a tie."""
    return jnp.abs(score_chosen_b - score_rejected_b).mean(where=tie_b)


def pair_metrics(
    score_chosen_b: jax.Array, score_rejected_b: jax.Array, tie_b: jax.Array | None
) -> dict[str, jax.Array]:
    """Returns the accuracy on the preferences and, if there are ties, `tie_margin`."""
    metrics = {"accuracy": accuracy(score_chosen_b, score_rejected_b, tie_b)}
    if tie_b is not None:
        metrics["tie_margin"] = tie_margin(score_chosen_b, score_rejected_b, tie_b)
    return metrics


def defined_mean(value_s: np.ndarray) -> float | None:
    """Returns the mean over the steps in which a metric is defined; None if there is none.

    An accuracy is undefined, NaN, in a step of ties alone.
    """
    defined_s = value_s[~np.isnan(value_s)]
    return float(defined_s.mean()) if len(defined_s) else None


def fine_tune(
    sarm: SARM,
    rows: Sequence[Conversation],
    pairs_p2: np.ndarray,
    options: PreferenceTraining,
    log: Log,
    tie_p: np.ndarray | None = None,
) -> SARM:
    """Trains a copy of a SARM (modes 1 to 3).

    The trunk computes in its own dtype, but the optimizer works on float32 copies: half precision
    would round away the steps of a small learning rate.

    Args:
        sarm: the SARM to start from; it is not changed.
        rows: the conversations.
        pairs_p2: row numbers (chosen, rejected) of each pair.
        options: options of the training.
        log: receives a metrics row after each step.
        tie_p: which pairs are ties; None if none is.

    Returns:
        The trained SARM; its trained parameters are float32.

    Raises:
        DivergedError: training diverged.
    """
    compute_dtype = sarm.trunk.embed_tokens.dtype
    graphdef, params, frozen = nnx.split(sarm, trainable(options.mode), ...)  # type: ignore[misc]
    params = jax.tree.map(lambda p: jnp.array(p, jnp.float32, copy=True), params)
    rng = np.random.default_rng(options.seed)
    steps = options.epochs * (len(pairs_p2) // min(options.batch_size, len(pairs_p2)))
    optimizer = make_optimizer(options, steps)
    opt_state = optimizer.init(params)
    last: deque[dict[str, Any]] = deque(maxlen=LAST_STEPS)
    with tqdm(total=steps, desc="preferences", unit="step") as bar:
        for step in range(steps):
            if step % (steps // options.epochs) == 0:
                batches = pair_batches(
                    rows, pairs_p2, batch_size=options.batch_size, rng=rng, tie_p=tie_p
                )
            batch = next(batches)
            params, opt_state, metrics = _train_step(
                graphdef,
                optimizer,
                options=options,
                compute_dtype=compute_dtype,
                params=params,
                opt_state=opt_state,
                frozen=frozen,
                batch=batch,
            )
            loss, acc = float(metrics["loss"]), float(metrics["accuracy"])
            check_loss(loss, "the loss on preferences", RATES)
            row = {name: defined_mean(np.asarray([value])) for name, value in metrics.items()}
            log({"stage": "preferences", "step": step + 1, **row})
            bar.update()
            bar.set_postfix(loss=f"{loss:.3f}", acc=f"{acc:.2f}")
            last.append(row)
    _check_last_losses(last, options)
    return nnx.merge(graphdef, params, frozen)


def _check_last_losses(last: Sequence[Mapping[str, Any]], options: PreferenceTraining) -> None:
    """Raises DivergedError if the mean loss of the last steps is that of a divergence."""
    largest = {"bradley_terry": options.largest_loss, "reconstruction": LARGEST_LOSS}
    for name, limit in largest.items():
        loss = sum(row[name] for row in last) / len(last)
        check_loss(loss, f"the loss {name}", RATES, limit)


def trainable(mode: int) -> nnx.filterlib.Filter:
    """Selects the parameters that `mode` trains, which never include the unused final norm."""

    def keep(path: tuple, _: Any) -> bool:
        if path[0] == "trunk":
            return mode > 0 and path[1] != "norm"
        return mode > 1 if path[0] == "sae" else True

    return keep


def make_optimizer(options: PreferenceTraining, steps: int) -> optax.GradientTransformation:
    """Makes AdamW with one learning-rate schedule for the head and one for everything else."""
    return optax.multi_transform(
        {
            "head": adamw(options.head_learning_rate, options, steps),
            "body": adamw(options.learning_rate, options, steps),
        },
        lambda params: _by_path(params, lambda names: "head" if "score" in names else "body"),
    )


@cache
def adamw(learning_rate, options, steps):
    """Makes AdamW with warm-up, cosine schedule and the weight decay of the options.

    Equal arguments give the same object, so that the heads of an ensemble share a program.
    """

    def decays(params):
        undecayed = {"scale", "pre_bias", "latent_bias"}
        return _by_path(params, lambda names: not undecayed & set(names))

    schedule = warmup_cosine(learning_rate, options.warmup_fraction, steps)
    return optax.adamw(schedule, weight_decay=options.weight_decay, mask=decays)


def _by_path(params, rule):
    """Applies `rule` to the names on the path of every parameter."""

    def apply(path, _):
        return rule([getattr(key, "key", getattr(key, "name", "")) for key in path])

    return jax.tree_util.tree_map_with_path(apply, params)


def pair_batches(
    rows: Sequence[Conversation],
    pairs_p2: np.ndarray,
    batch_size: int,
    rng: np.random.Generator,
    tie_p: np.ndarray | None = None,
) -> Iterator[tuple[np.ndarray, np.ndarray, np.ndarray, np.ndarray | None]]:
    """Yields the batches of one epoch: (tokens, mask, mask of the assistant turn, ties).

    Tokens and masks are `[2B, T]`, and the B chosen rows come first. The ties are `[B]`, or None if
    `tie_p` is. Pairs of similar length share a batch. Each epoch leaves out fewer than B random
    pairs that do not fill a batch.
    """
    batch_size = min(batch_size, len(pairs_p2))
    order = rng.permutation(len(pairs_p2))[: len(pairs_p2) // batch_size * batch_size]
    length_p = [bucket_length(max(len(rows[i].ids) for i in pair)) for pair in pairs_p2]
    order = order[np.argsort(np.asarray(length_p)[order], kind="stable")]
    for chunk in rng.permutation(order.reshape(-1, batch_size)):
        batch = [rows[i] for i in pairs_p2[chunk].T.ravel()]
        tokens_bt, mask_bt = pad_batch([r.ids for r in batch], max(length_p[p] for p in chunk), 0)
        from_end_bt = np.cumsum(mask_bt[:, ::-1], axis=1)[:, ::-1]
        turn_b1 = np.asarray([[r.turn_length] for r in batch])
        tie_b = None if tie_p is None else tie_p[chunk]
        yield tokens_bt, mask_bt, mask_bt & (from_end_bt <= turn_b1), tie_b


@partial(
    jax.jit,
    static_argnames=("graphdef", "optimizer", "options", "compute_dtype"),
    donate_argnames=("params", "opt_state"),
)
def _train_step(graphdef, optimizer, options, compute_dtype, params, opt_state, frozen, batch):
    """Makes one optimizer step on a batch of `pair_batches`."""

    def loss_fn(params):
        sarm = nnx.merge(graphdef, params, frozen)
        sarm.trunk = cast(sarm.trunk, compute_dtype)
        tokens_bt, mask_bt, turn_bt, tie_b = batch
        return preference_loss(
            sarm,
            tokens_bt,
            mask_bt,
            turn_bt=turn_bt,
            mode=options.mode,
            reconstruction_weight=options.reconstruction_weight,
            tie_b=tie_b,
            tie_weight=options.tie_weight,
        )

    grads, metrics = jax.grad(loss_fn, has_aux=True)(params)
    updates, opt_state = optimizer.update(grads, opt_state, params)
    return optax.apply_updates(params, updates), opt_state, metrics


def preference_loss(
    sarm: SARM,
    tokens_bt: jax.Array,
    mask_bt: jax.Array,
    turn_bt: jax.Array,
    mode: int,
    reconstruction_weight: float,
    tie_b: jax.Array | None = None,
    tie_weight: float = 1.0,
) -> tuple[jax.Array, dict[str, jax.Array]]:
    """Computes the loss of a mode on a batch, of which the first B rows are the chosen ones.

    Args:
        sarm: the model.
        tokens_bt: token ids `[2B, T]`.
        mask_bt: mask of the tokens that are no padding.
        turn_bt: mask of the tokens of the assistant turn.
        mode: 1 to 3.
        reconstruction_weight: λ.
        tie_b: which pairs are ties; None if none is.
        tie_weight: weight of a tie.

    Returns:
        (L, {loss, accuracy, bradley_terry, reconstruction}, with ties also tie_margin); the
        reconstruction loss is 0 if the mode does not train it.
    """
    h_btd = sarm.trunk.hidden(tokens_bt, mask_bt)
    x_bd = standardise(h_btd[jnp.arange(h_btd.shape[0]), last_position(mask_bt)])
    reading_sae = sarm.sae if mode == 2 else detach(sarm.sae)
    chosen_b, rejected_b = jnp.split(sarm.head(reading_sae.encode(x_bd)), 2)
    bradley_terry = bradley_terry_loss(chosen_b, rejected_b, tie_b, tie_weight)
    reconstruction = jnp.float32(0)
    if mode >= 2:
        x_btd = standardise(h_btd if mode == 2 else jax.lax.stop_gradient(h_btd))
        reconstruction = turn_reconstruction_loss(sarm.sae, x_btd, turn_bt)
    loss = bradley_terry + reconstruction_weight * reconstruction
    return loss, {
        "loss": loss,
        **pair_metrics(chosen_b, rejected_b, tie_b),
        "bradley_terry": bradley_terry,
        "reconstruction": reconstruction,
    }


def turn_reconstruction_loss(sae: SAE, x_btd: jax.Array, turn_bt: jax.Array) -> jax.Array:
    """Computes L_rec as a mean over all tokens of the batch that `turn_bt` marks.

    The reconstruction uses the k kept latents, even if the head reads all of them.
    """
    x_nd = x_btd.reshape(-1, x_btd.shape[-1])
    x_hat_nd = sae.decode(top_k(sae.pre_activations(x_nd), sae.config.k))
    loss_n, turn_n = reconstruction_loss(x_nd, x_hat_nd), turn_bt.reshape(-1)
    return jnp.where(turn_n, loss_n, 0).sum() / turn_n.sum()


def detach(module: T) -> T:
    """Returns the module with its parameters excluded from differentiation."""
    graphdef, state = nnx.split(module)
    return nnx.merge(graphdef, jax.lax.stop_gradient(state))


def cast(module: T, dtype: Any) -> T:
    """Returns the module with its parameters in `dtype`; it copies only those of another dtype."""
    graphdef, state = nnx.split(module)
    return nnx.merge(graphdef, jax.tree.map(lambda p: p.astype(dtype), state))
