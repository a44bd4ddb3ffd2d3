"""Detectors and carriers: which latents tell that something is there, and which are paid for it.

All are found on contrast pairs, responses that differ only in what is to be found: `clean`
without it, `marked` with it.

Detectors fire, z_i > τ_i, on marked responses and hardly ever on clean ones; τ_i is a quantile of
z_i on the clean side. They are picked greedily: each adds the most newly detected responses minus
newly raised false alarms, within a budget of false alarms for all of them together.

A control has as many features with thresholds of the same rule, drawn at random from those that
are ever active and are no detectors: what a penalty does that knows nothing.

Carriers are the latents through which the reward model pays: the largest w_i · (mean z_i on
marked − mean z_i on clean). The two lists need not meet. A detector may have no weight in the
reward, so that zeroing it changes nothing, and still be the right thing to penalise.
"""

import dataclasses
from collections.abc import Sequence

import numpy as np

MIN_GAIN = 0.005  # share of responses that a further detector has to add


@dataclasses.dataclass(frozen=True)
class Detectors:
    """Features in the order they were picked, with their thresholds, and what they do together.

    `detection` and `false_alarms` are the shares of marked and clean responses on which at least
    one of the features fires.
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


def find_detectors(
    clean_nf: np.ndarray, marked_nf: np.ndarray, quantile: float, budget: float, most: int
) -> Detectors:
    """Calibrates τ on clean latents `[N, M]`, covers the marked ones with ≤ `most` features."""
    tau_f = calibrated_tau(clean_nf, quantile)
    hit_nf, alarm_nf = marked_nf > tau_f, clean_nf > tau_f
    hit_n, alarm_n = np.zeros(len(marked_nf), bool), np.zeros(len(clean_nf), bool)
    chosen: list[int] = []
    while len(chosen) < most:
        detection_f = (hit_nf | hit_n[:, None]).mean(axis=0)
        alarms_f = (alarm_nf | alarm_n[:, None]).mean(axis=0)
        gain_f = detection_f - hit_n.mean() - (alarms_f - alarm_n.mean())
        gain_f[alarms_f > budget] = -np.inf
        best = int(np.argmax(gain_f))
        if gain_f[best] < MIN_GAIN:
            break
        chosen.append(best)
        hit_n, alarm_n = hit_n | hit_nf[:, best], alarm_n | alarm_nf[:, best]
    return _together(chosen, tau_f, clean_nf, marked_nf)


def random_control(
    clean_nf: np.ndarray, marked_nf: np.ndarray, quantile: float, avoid: Sequence[int], seed: int
) -> Detectors:
    """As many features as `avoid` has, where there are that many, and none of those."""
    active = np.flatnonzero((np.concatenate([clean_nf, marked_nf]) > 0).any(axis=0))
    candidates = np.setdiff1d(active, avoid)
    rng = np.random.default_rng(seed)
    chosen = rng.permutation(candidates)[: len(avoid)].tolist()
    return _together(chosen, calibrated_tau(clean_nf, quantile), clean_nf, marked_nf)


def _together(
    chosen: Sequence[int], tau_f: np.ndarray, clean_nf: np.ndarray, marked_nf: np.ndarray
) -> Detectors:
    tau_n = tau_f[list(chosen)]

    found = Detectors(tuple(chosen), tuple(tau_n.tolist()), 0.0, 0.0)
    return dataclasses.replace(
        found,
        detection=firing_rate(marked_nf, found),
        false_alarms=firing_rate(clean_nf, found),
    )


def firing_rate(z_nf: np.ndarray, detectors: Detectors) -> float:
    """The share of responses `[N, M]` on which at least one detector fires."""
    tau_n = np.asarray(detectors.tau, np.float32)
    return float((z_nf[:, list(detectors.features)] > tau_n).any(axis=1).mean())


def carried_reward(clean_nf: np.ndarray, marked_nf: np.ndarray, weight_f: np.ndarray) -> np.ndarray:
    """w_i · (mean z_i on marked − on clean) `[M]`: what each latent pays for the difference."""
    return weight_f * (marked_nf.mean(axis=0) - clean_nf.mean(axis=0))
