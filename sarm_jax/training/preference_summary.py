"""Scores of the pairs after training, and their summary: accuracy, margins, heads and ties."""

from collections.abc import Callable
from functools import partial
from typing import Any

import jax
import numpy as np
from flax import nnx

from sarm_jax.models.sarm import SARM
from sarm_jax.parallel.processes import fetch
from sarm_jax.reporting.statistics import count_wins, wilson_interval
from sarm_jax.training.activations import Rows, read_rows
from sarm_jax.training.pair_set import SIDES, PairSet


def score_pooled(sarm: SARM, pooled_rd: Rows, batch: int = 256) -> np.ndarray:
    """Computes the scores `[R]` of pooled, standardised trunk states `[R, D]`."""
    return _in_batches(_score_pooled, sarm, pooled_rd, batch)


@partial(jax.jit, static_argnums=0)
def _score_pooled(graphdef, state, x_bd):
    """Computes the scores `[B]` of one batch."""
    sarm = nnx.merge(graphdef, state)
    return sarm.head(sarm.sae.encode(x_bd))


def score_by_head(sarm: SARM, pooled_rd: Rows, batch: int = 256) -> np.ndarray:
    """Computes the scores `[R, H]` that the heads of an ensemble give to pooled states `[R, D]`."""
    return _in_batches(_score_by_head, sarm, pooled_rd, batch)


def _in_batches(score: Callable, sarm: SARM, pooled_rd: Rows, batch: int) -> np.ndarray:
    """Calls a compiled function of (structure, parameters, states) for `batch` states at a time."""
    graphdef, state = nnx.split(sarm)
    batches = (slice(start, start + batch) for start in range(0, len(pooled_rd), batch))
    return np.concatenate(
        [fetch(score(graphdef, state, read_rows(pooled_rd, rows))) for rows in batches]
    )


@partial(jax.jit, static_argnums=0)
def _score_by_head(graphdef, state, x_bd):
    """Computes the scores `[B, H]` of one batch."""
    sarm = nnx.merge(graphdef, state)
    return sarm.scores_by_head(sarm.sae.encode(x_bd))


def head_summary(data: PairSet, score_rh: np.ndarray) -> dict[str, Any]:
    """Summarises the heads of an ensemble by their scores `[R, H]`, on held-out pairs.

    Returns:
        By head: `accuracy` and `worst_share`, the share of the responses to which the head gives
        the least score of all heads. `accuracy_min` is the accuracy of that least score, and
        `margin_std` the standard deviation of a pair's margin over the heads, mean over pairs.
    """
    pairs_p2, score_rh = data.pairs_p2[data.held_out_p], score_rh.astype(np.float64)
    margin_ph = score_rh[pairs_p2[:, 0]] - score_rh[pairs_p2[:, 1]]
    least_r = score_rh.min(axis=1)
    worst_r = score_rh[np.unique(pairs_p2)].argmin(axis=1)
    shares = np.bincount(worst_r, minlength=score_rh.shape[1]) / len(worst_r)
    least_margin_p = least_r[pairs_p2[:, 0]] - least_r[pairs_p2[:, 1]]
    return {
        "accuracy": count_wins(margin_ph).mean(axis=0).tolist(),
        "worst_share": shares.tolist(),
        "accuracy_min": float(count_wins(least_margin_p).mean()),
        "margin_std": float(margin_ph.std(axis=1).mean()),
    }


def preference_summary(data: PairSet, score_r: np.ndarray) -> dict[str, Any]:
    """Summarises accuracies, margins and scales of the scores `[R]` of all conversations.

    `length_only_accuracy_held_out` is the accuracy of preferring the longer or the shorter
    conversation in tokens, whichever is better: what a reward would reach that only counts.
    """
    margin_p = score_r[data.pairs_p2[:, 0]] - score_r[data.pairs_p2[:, 1]]
    right_p = count_wins(margin_p)
    held_out_p = data.held_out_p
    length_r = np.asarray([len(row.ids) for row in data.rows])
    longer_p = count_wins(length_r[data.pairs_p2[:, 0]] - length_r[data.pairs_p2[:, 1]])
    longer = float(longer_p[held_out_p].mean())
    held_out = float(right_p[held_out_p].mean())
    prompts = len(np.unique(data.prompt_p[held_out_p]))
    source_p = np.asarray(data.source_p)
    scores = {side: score_r[data.pairs_p2[held_out_p, i]] for i, side in enumerate(SIDES)}
    return {
        "pairs_train": int((~held_out_p).sum()),
        "pairs_held_out": int(held_out_p.sum()),
        "prompts_held_out": prompts,
        "accuracy_train": float(right_p[~held_out_p].mean()),
        "accuracy_held_out": held_out,
        "accuracy_held_out_95": wilson_interval(held_out, prompts),
        "accuracy_held_out_by_source": {
            str(source): float(right_p[held_out_p & (source_p == source)].mean())
            for source in np.unique(source_p[held_out_p])
        },
        "length_only_accuracy_held_out": max(longer, 1 - longer),
        "margin_train": float(margin_p[~held_out_p].mean()),
        "margin_held_out": float(margin_p[held_out_p].mean()),
        **{f"score_{side}_mean": float(scores[side].mean()) for side in SIDES},
        **{f"score_{side}_std": float(scores[side].std()) for side in SIDES},
    }


def tie_summary(ties: PairSet, score_r: np.ndarray) -> dict[str, Any]:
    """Summarises what the scores `[R]` make of ties, whose rejected sides have the shortcut.

    Returns:
        `train`, `held_out` and, by source, `held_out_by_source`: each with the numbers of `pairs`
        and `prompts`, `margin_abs`, the mean |difference| of the scores, `prefers_rejected`, the
        share of the pairs whose shortcut side scores higher (equal scores count half), and its
        95 % interval. A mean over no pairs is null.
    """
    score_r = score_r.astype(np.float64)
    margin_p = score_r[ties.pairs_p2[:, 0]] - score_r[ties.pairs_p2[:, 1]]
    source_p = np.asarray(ties.source_p)

    def summarise(keep_p: np.ndarray) -> dict[str, Any]:
        prompts = len(np.unique(ties.prompt_p[keep_p]))
        if not prompts:
            return {"pairs": 0, "prompts": 0, "margin_abs": None} | dict.fromkeys(shares)
        share = float(count_wins(-margin_p[keep_p]).mean())
        values = share, wilson_interval(share, prompts)
        return {
            "pairs": int(keep_p.sum()),
            "prompts": prompts,
            "margin_abs": float(np.abs(margin_p[keep_p]).mean()),
            **dict(zip(shares, values, strict=True)),
        }

    shares = ("prefers_rejected", "prefers_rejected_95")
    return {
        "train": summarise(~ties.held_out_p),
        "held_out": summarise(ties.held_out_p),
        "held_out_by_source": {
            str(source): summarise(ties.held_out_p & (source_p == source))
            for source in np.unique(source_p[ties.held_out_p])
        },
    }
