"""Detectors and carriers: which latents tell that something is there, and which are paid for it.

All are found on contrast pairs, responses that differ only in what is to be found: `clean`
without it, `marked` with it.

Detectors fire, z_i > τ_i, on marked responses and hardly ever on clean ones; τ_i is a quantile of
z_i on the clean side. They are picked greedily: each adds the most newly detected responses minus
newly raised false alarms, within a budget of false alarms for all of them together.

On the pairs that they were picked on they look better than they are, the more so the fewer pairs
there are: what they do elsewhere, `held_out_rates` finds by cross-validation.

A control has as many features with thresholds of the same rule, drawn at random from those that
are ever active and are no detectors: what a penalty does that knows nothing.

Carriers are the latents through which the reward model pays: the largest w_i · (mean z_i on
marked − mean z_i on clean). The two lists need not meet. A detector may have no weight in the
reward, so that zeroing it changes nothing, and still be the right thing to penalise.
"""

import dataclasses
from collections.abc import Sequence

import numpy as np

from sarm_jax.models.latent_store import Contrast

MIN_GAIN = 0.005  # share of responses that a further detector has to add


@dataclasses.dataclass(frozen=True)
class Detectors:
    """Features in the order they were picked, with their thresholds, and what they do together.

    `detection` and `false_alarms` are the shares of marked and clean responses on which at least
    one of the features fires, of those that the features were found on.
    """

    features: tuple[int, ...]
    tau: tuple[float, ...]
    detection: float
    false_alarms: float


def calibrated_tau(clean_nf: np.ndarray, quantile: float) -> np.ndarray:
    """τ `[M]`, the quantile of each latent on clean responses, float32.

    Never negative, so a latent that is merely active at all needs z > 0.
    """
    return np.maximum(np.quantile(clean_nf, quantile, axis=0), 0).astype(np.float32)


def taus_of(contrast: Contrast, quantile: float) -> np.ndarray:
    """`calibrated_tau` of all features of a contrast, float32 `[M]`, block by block."""
    tau_f = np.zeros(contrast.size, np.float32)
    rank = int(np.ceil(quantile * (len(contrast) - 1)))
    for ids, clean_nb, _ in contrast.blocks():
        # Where the value of that rank is not above 0, neither is the quantile.
        often = (clean_nb > 0).sum(axis=0) >= len(contrast) - rank
        if often.any():
            tau_f[ids[often]] = calibrated_tau(clean_nb[:, often], quantile)
    return tau_f


def find_detectors(contrast: Contrast, tau_f: np.ndarray, budget: float, most: int) -> Detectors:
    """Covers the marked responses with at most `most` features, z > τ.

    Only features that alone keep the budget and add enough can ever be picked, so only the rows
    on which these fire are kept.
    """
    pairs = len(contrast)
    ids, hit_row, hit_place, alarm_row, alarm_place = _candidates(contrast, tau_f, budget)
    hit_n, alarm_n = np.zeros(pairs, bool), np.zeros(pairs, bool)
    chosen: list[int] = []
    while len(chosen) < most and len(ids):
        new_hits = np.bincount(hit_place[~hit_n[hit_row]], minlength=len(ids))
        new_alarms = np.bincount(alarm_place[~alarm_n[alarm_row]], minlength=len(ids))
        detection_c = (new_hits + hit_n.sum()) / pairs
        alarms_c = (new_alarms + alarm_n.sum()) / pairs
        gain_c = detection_c - hit_n.mean() - (alarms_c - alarm_n.mean())
        gain_c[alarms_c > budget] = -np.inf
        best = int(np.argmax(gain_c))
        if gain_c[best] < MIN_GAIN:
            break
        chosen.append(int(ids[best]))
        hit_n[hit_row[hit_place == best]] = True
        alarm_n[alarm_row[alarm_place == best]] = True
    return _together(chosen, tau_f, contrast)


def held_out_rates(
    contrast: Contrast, fold_p: np.ndarray, quantile: float, budget: float, most: int
) -> tuple[float, float]:
    """(detection, false alarms) on each fold of detectors found, with their τ, on the others.

    NaN where there is one fold only.
    """
    folds = np.unique(fold_p)
    if len(folds) < 2:
        return float("nan"), float("nan")
    hits, alarms = 0.0, 0.0
    for fold in folds:
        rest, here = contrast.subset(fold_p != fold), contrast.subset(fold_p == fold)
        found = find_detectors(rest, taus_of(rest, quantile), budget, most)
        clean_nb, marked_nb = here.columns(np.asarray(found.features, np.int64))
        tau_b = np.asarray(found.tau, np.float32)
        hits += len(here) * _any_fires(marked_nb, tau_b)
        alarms += len(here) * _any_fires(clean_nb, tau_b)
    return hits / len(contrast), alarms / len(contrast)


def _candidates(contrast: Contrast, tau_f: np.ndarray, budget: float):
    """(feature ids, rows and places in ids of hits, rows and places of false alarms)."""
    rows: tuple[list[np.ndarray], ...] = ([], [])
    places: tuple[list[np.ndarray], ...] = ([], [])
    ids_c, count = [], 0
    for ids, clean_nb, marked_nb in contrast.blocks():
        alarm_nb, hit_nb = clean_nb > tau_f[ids], marked_nb > tau_f[ids]
        enough = hit_nb.mean(axis=0) >= MIN_GAIN * (1 - 1e-6)
        keep = np.flatnonzero(enough & (alarm_nb.mean(axis=0) <= budget))
        for side, fires_nb in enumerate((hit_nb, alarm_nb)):
            row, place = np.nonzero(fires_nb[:, keep])
            rows[side].append(row.astype(np.int32))
            places[side].append((place + count).astype(np.int32))
        ids_c.append(ids[keep])
        count += len(keep)
    hits = np.concatenate(rows[0]), np.concatenate(places[0])
    alarms = np.concatenate(rows[1]), np.concatenate(places[1])
    return np.concatenate(ids_c), *hits, *alarms


def random_control(
    contrast: Contrast, tau_f: np.ndarray, avoid: Sequence[int], seed: int
) -> Detectors:
    """As many features as `avoid` has, where there are that many, and none of those."""
    active = [
        ids[(clean_nb > 0).any(axis=0) | (marked_nb > 0).any(axis=0)]
        for ids, clean_nb, marked_nb in contrast.blocks()
    ]
    candidates = np.setdiff1d(np.concatenate(active), avoid)
    rng = np.random.default_rng(seed)
    chosen = rng.permutation(candidates)[: len(avoid)].tolist()
    return _together(chosen, tau_f, contrast)


def _together(chosen: Sequence[int], tau_f: np.ndarray, contrast: Contrast) -> Detectors:
    tau_n = tau_f[list(chosen)]
    clean_nb, marked_nb = contrast.columns(np.asarray(chosen, np.int64))
    return Detectors(
        tuple(chosen),
        tuple(tau_n.tolist()),
        _any_fires(marked_nb, tau_n),
        _any_fires(clean_nb, tau_n),
    )


def _any_fires(z_nb: np.ndarray, tau_b: np.ndarray) -> float:
    return float((z_nb > tau_b).any(axis=1).mean())


def firing_rate(z_nf: np.ndarray, detectors: Detectors) -> float:
    """The share of responses `[N, M]` on which at least one detector fires."""
    tau_n = np.asarray(detectors.tau, np.float32)
    return _any_fires(z_nf[:, list(detectors.features)], tau_n)
