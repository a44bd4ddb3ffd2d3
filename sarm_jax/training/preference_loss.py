"""The losses of a SARM on a batch of pairs, and the metrics of its scores.

    L_BT = −mean log σ(r_chosen − r_rejected)          (Bradley & Terry 1952; Ouyang 2203.02155)
    L    = L_BT + λ L_rec,      L_rec = mean ‖x̂ − x‖² / ‖x‖² over the last assistant turn

A tie, a pair whose sides are equally good, has the label ½ instead of 1: with Δ the difference of
its scores, it adds weight · (−½ log σ(Δ) − ½ log σ(−Δ)) to the mean, which is least at Δ = 0.

The losses of the pieces of a batch add up to the loss of the batch, because every piece divides its
sums by the numbers of pairs and of tokens of the whole batch.
"""

from typing import Any, TypeVar

import chex
import jax
import jax.numpy as jnp
from flax import nnx

from sarm_jax.models.sae import SAE, reconstruction_loss, standardise, top_k
from sarm_jax.models.sarm import SARM, last_position

T = TypeVar("T", bound=nnx.Module)
Losses = dict[str, jax.Array]  # of a piece, see `piece_loss`


def bradley_terry_loss(
    score_chosen_b: jax.Array,
    score_rejected_b: jax.Array,
    tie_b: jax.Array | None = None,
    tie_weight: float = 1.0,
    pairs: int | None = None,
) -> jax.Array:
    """Computes L_BT, the mean loss of the pairs; a pair of equal scores adds log 2.

    Args:
        score_chosen_b: scores of the chosen sides.
        score_rejected_b: scores of the rejected sides.
        tie_b: which pairs are ties; None if none is.
        tie_weight: weight of a tie. The sum is divided by the number of pairs, whatever their
            weights, so that a preference counts the same in every batch.
        pairs: the number of pairs of the whole batch; None if these are all.
    """
    chex.assert_rank([score_chosen_b, score_rejected_b], 1)
    margin_b = score_chosen_b - score_rejected_b
    pairs = len(margin_b) if pairs is None else pairs
    loss_b = -jax.nn.log_sigmoid(margin_b)
    if tie_b is not None:
        tied_b = -(jax.nn.log_sigmoid(margin_b) + jax.nn.log_sigmoid(-margin_b)) / 2
        loss_b = jnp.where(tie_b, tie_weight * tied_b, loss_b)
    return loss_b.sum() / pairs


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
    """Computes the loss of a mode on a whole batch; the arguments are those of `piece_loss`.

    Returns:
        (L, `batch_metrics`).
    """
    loss, losses = piece_loss(
        sarm,
        tokens_bt,
        mask_bt,
        turn_bt=turn_bt,
        mode=mode,
        reconstruction_weight=reconstruction_weight,
        pairs=len(tokens_bt) // 2,
        turn_tokens=turn_bt.sum(),
        tie_b=tie_b,
        tie_weight=tie_weight,
    )
    return loss, batch_metrics(losses, tie_b)


def piece_loss(
    sarm: SARM,
    tokens_bt: jax.Array,
    mask_bt: jax.Array,
    turn_bt: jax.Array,
    mode: int,
    reconstruction_weight: float,
    pairs: int,
    turn_tokens: jax.Array,
    tie_b: jax.Array | None = None,
    tie_weight: float = 1.0,
) -> tuple[jax.Array, Losses]:
    """Computes what a piece of a batch adds to the loss of a mode.

    Args:
        sarm: the model.
        tokens_bt: token ids `[2B, T]`, of which the first B rows are the chosen ones.
        mask_bt: mask of the tokens that are no padding.
        turn_bt: mask of the tokens of the assistant turn.
        mode: 1 to 3.
        reconstruction_weight: λ.
        pairs: the number of pairs of the whole batch.
        turn_tokens: the number of tokens that `turn_bt` marks in the whole batch.
        tie_b: which pairs are ties; None if none is.
        tie_weight: weight of a tie.

    Returns:
        (the share of L, {loss, bradley_terry, reconstruction, chosen, rejected}): the shares of the
        losses and the scores `[B]`. The reconstruction loss is 0 if the mode does not train it.
    """
    h_btd = sarm.trunk.hidden(tokens_bt, mask_bt)
    x_bd = standardise(h_btd[jnp.arange(h_btd.shape[0]), last_position(mask_bt)])
    reading_sae = sarm.sae if mode == 2 else detach(sarm.sae)
    chosen_b, rejected_b = jnp.split(sarm.head(reading_sae.encode(x_bd)), 2)
    bradley_terry = bradley_terry_loss(chosen_b, rejected_b, tie_b, tie_weight, pairs)
    reconstruction = jnp.float32(0)
    if mode >= 2:
        x_btd = standardise(h_btd if mode == 2 else jax.lax.stop_gradient(h_btd))
        reconstruction = turn_reconstruction_loss(sarm.sae, x_btd, turn_bt, turn_tokens)
    loss = bradley_terry + reconstruction_weight * reconstruction
    return loss, {
        "loss": loss,
        "bradley_terry": bradley_terry,
        "reconstruction": reconstruction,
        "chosen": chosen_b,
        "rejected": rejected_b,
    }


def batch_metrics(losses: Losses, tie_b: jax.Array | None) -> dict[str, Any]:
    """Returns {loss, accuracy, bradley_terry, reconstruction}, with ties also tie_margin.

    Args:
        losses: those of `piece_loss` for a whole batch.
        tie_b: which pairs are ties; None if none is.
    """
    return {
        "loss": losses["loss"],
        **pair_metrics(losses["chosen"], losses["rejected"], tie_b),
        "bradley_terry": losses["bradley_terry"],
        "reconstruction": losses["reconstruction"],
    }


def turn_reconstruction_loss(
    sae: SAE, x_btd: jax.Array, turn_bt: jax.Array, turn_tokens: jax.Array | None = None
) -> jax.Array:
    """Computes L_rec, summed over the tokens that `turn_bt` marks and divided by their number.

    The reconstruction uses the k kept latents, even if the head reads all of them. `turn_tokens` is
    the number of such tokens of the whole batch; None if these are all.
    """
    x_nd = x_btd.reshape(-1, x_btd.shape[-1])
    x_hat_nd = sae.decode(top_k(sae.pre_activations(x_nd), sae.config.k, sae.placement))
    loss_n, turn_n = reconstruction_loss(x_nd, x_hat_nd), turn_bt.reshape(-1)
    turn_tokens = turn_n.sum() if turn_tokens is None else turn_tokens
    return jnp.where(turn_n, loss_n, 0).sum() / turn_tokens


def detach(module: T) -> T:
    """Returns the module with its parameters excluded from differentiation."""
    graphdef, state = nnx.split(module)
    return nnx.merge(graphdef, jax.lax.stop_gradient(state))
