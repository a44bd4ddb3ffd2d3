"""Detectors and carriers: latents that signal a property, and latents that the reward pays for.

Both are found on contrast pairs, which are pairs of responses that differ only in the property to
detect: the `clean` response lacks it, the `marked` response has it.

Detectors fire, z_i > τ_i, on marked responses and hardly ever on clean ones. τ_i is a quantile of
z_i on the clean responses. Detectors are selected greedily: each one adds the largest number of
newly detected responses minus new false positives, within a budget for the false-positive rate of
all detectors together.

On the pairs that detectors were selected on, their rates are optimistic, and more so the fewer the
pairs. `held_out_rates` estimates the rates on other prompts by cross-validation.

A random control has as many features as there are detectors, with thresholds by the same rule. They
are drawn at random from the features that are active on some response and are not detectors. The
control shows the effect of a penalty that carries no information.

Carriers are the latents through which the reward model pays: the largest w_i · (mean z_i on
marked − mean z_i on clean). The two lists need not overlap. A detector may have no weight in the
reward, so that zeroing it changes nothing, and still be the right feature to penalise.
"""

import dataclasses
from collections.abc import Callable, Sequence

import numpy as np

from sarm_jax.models.latent_store import Contrast

MIN_GAIN = 0.005  # share of the responses that each further detector has to add


@dataclasses.dataclass(frozen=True)
class Detectors:
    """Features with their thresholds, and their joint rates on the pairs they were selected on.

    Attributes:
        features: ids in the order of their selection.
        tau: threshold of each feature.
        detection_rate: share of the marked responses on which at least one feature fires.
        false_positive_rate: share of the clean responses on which at least one feature fires.
    """

    features: tuple[int, ...]
    tau: tuple[float, ...]
    detection_rate: float
    false_positive_rate: float


def calibrated_tau(clean_nf: np.ndarray, quantile: float) -> np.ndarray:
    """Computes τ `[M]`, the quantile of each latent on clean responses, float32.

    τ is never negative, so that a latent fires only if z > 0.
    """
    return np.maximum(np.quantile(clean_nf, quantile, axis=0), 0).astype(np.float32)


def contrast_tau(contrast: Contrast, quantile: float) -> np.ndarray:
    """Computes `calibrated_tau` `[M]` of all features of a contrast, block by block."""
    tau_f = np.zeros(contrast.size, np.float32)
    rank = int(np.ceil(quantile * (len(contrast) - 1)))
    for ids, clean_nb, _ in contrast.blocks():
        # If the value of that rank is not above 0, neither is the quantile.
        often = (clean_nb > 0).sum(axis=0) >= len(contrast) - rank
        if often.any():
            tau_f[ids[often]] = calibrated_tau(clean_nb[:, often], quantile)
    return tau_f


def find_detectors(
    contrast: Contrast, tau_f: np.ndarray, budget: float, max_features: int
) -> Detectors:
    """Covers the marked responses greedily with features that fire if z > τ.

    Only the features that keep the budget on their own and add enough can ever be selected, so only
    the rows on which these fire are kept in memory.

    Args:
        contrast: clean and marked latents.
        tau_f: thresholds `[M]`.
        budget: largest false-positive rate of all detectors together.
        max_features: largest number of detectors.
    """
    pairs = len(contrast)
    ids, hit_row, hit_place, alarm_row, alarm_place = _candidates(contrast, tau_f, budget)
    hit_n, alarm_n = np.zeros(pairs, bool), np.zeros(pairs, bool)
    selected: list[int] = []
    while len(selected) < max_features and len(ids):
        new_hits = np.bincount(hit_place[~hit_n[hit_row]], minlength=len(ids))
        new_alarms = np.bincount(alarm_place[~alarm_n[alarm_row]], minlength=len(ids))
        detection_c = (new_hits + hit_n.sum()) / pairs
        alarms_c = (new_alarms + alarm_n.sum()) / pairs
        gain_c = detection_c - hit_n.mean() - (alarms_c - alarm_n.mean())
        gain_c[alarms_c > budget] = -np.inf
        best = int(np.argmax(gain_c))
        if gain_c[best] < MIN_GAIN:
            break
        selected.append(int(ids[best]))
        hit_n[hit_row[hit_place == best]] = True
        alarm_n[alarm_row[alarm_place == best]] = True
    return _with_rates(selected, tau_f, contrast)


def held_out_rates(
    contrast: Contrast, fold_p: np.ndarray, quantile: float, budget: float, max_features: int
) -> tuple[float, float]:
    """Estimates the rates of detectors on prompts that they were not selected on.

    The rates on each fold are those of detectors that were selected on the other folds, with the
    thresholds of those folds.

    Args:
        contrast: clean and marked latents.
        fold_p: number of the fold of each pair.
        quantile: quantile of the thresholds.
        budget: as in `find_detectors`.
        max_features: as in `find_detectors`.

    Returns:
        (detection rate, false-positive rate); NaN if there is only one fold.
    """

    def rates(training: Contrast, held_out: Contrast) -> tuple[float, float]:
        detectors = find_detectors(
            training,
            contrast_tau(training, quantile),
            budget=budget,
            max_features=max_features,
        )
        clean_nb, marked_nb = held_out.columns(np.asarray(detectors.features, np.int64))
        tau_b = np.asarray(detectors.tau, np.float32)
        return _share_firing(marked_nb, tau_b), _share_firing(clean_nb, tau_b)

    return cross_validated_rates(contrast, fold_p, rates)


def cross_validated_rates(
    contrast: Contrast,
    fold_p: np.ndarray,
    rates: Callable[[Contrast, Contrast], tuple[float, float]],
) -> tuple[float, float]:
    """Averages the rates on every fold of what was found on the other folds.

    Args:
        contrast: all pairs.
        fold_p: number of the fold of each pair.
        rates: given the pairs of the other folds and those of a fold, finds something on the former
            and returns its (detection rate, false-positive rate) on the latter.

    Returns:
        (detection rate, false-positive rate) over all pairs; NaN if there is only one fold.
    """
    folds = np.unique(fold_p)
    if len(folds) < 2:
        return float("nan"), float("nan")
    hits, alarms = 0.0, 0.0
    for fold in folds:
        held_out = contrast.subset(fold_p == fold)
        hit_rate, alarm_rate = rates(contrast.subset(fold_p != fold), held_out)
        hits += len(held_out) * hit_rate
        alarms += len(held_out) * alarm_rate
    return hits / len(contrast), alarms / len(contrast)


def _candidates(contrast: Contrast, tau_f: np.ndarray, budget: float):
    """Lists the features that can be selected, and where each of them fires.

    Returns:
        (feature ids, rows of hits, their places in the ids, rows of false positives, their places
        in the ids).
    """
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
    contrast: Contrast, tau_f: np.ndarray, exclude: Sequence[int], seed: int | Sequence[int]
) -> Detectors:
    """Draws as many active features as `exclude` has, without those in `exclude`.

    If there are fewer, all of them are taken.
    """
    active = [
        ids[(clean_nb > 0).any(axis=0) | (marked_nb > 0).any(axis=0)]
        for ids, clean_nb, marked_nb in contrast.blocks()
    ]
    candidates = np.setdiff1d(np.concatenate(active), exclude)
    rng = np.random.default_rng(seed)
    drawn = rng.permutation(candidates)[: len(exclude)].tolist()
    return _with_rates(drawn, tau_f, contrast)


def _with_rates(features: Sequence[int], tau_f: np.ndarray, contrast: Contrast) -> Detectors:
    """Measures the joint rates of features on a contrast."""
    tau_n = tau_f[list(features)]
    clean_nb, marked_nb = contrast.columns(np.asarray(features, np.int64))
    return Detectors(
        features=tuple(features),
        tau=tuple(tau_n.tolist()),
        detection_rate=_share_firing(marked_nb, tau_n),
        false_positive_rate=_share_firing(clean_nb, tau_n),
    )


def _share_firing(z_nb: np.ndarray, tau_b: np.ndarray) -> float:
    """Computes the share of rows on which at least one column exceeds its threshold."""
    return float((z_nb > tau_b).any(axis=1).mean())


def firing_rate(z_nf: np.ndarray, detectors: Detectors) -> float:
    """Computes the share of responses `[N, M]` on which at least one detector fires."""
    tau_n = np.asarray(detectors.tau, np.float32)
    return _share_firing(z_nf[:, list(detectors.features)], tau_n)
