"""Detectors and carriers: which latents tell that something is there, and which are paid for it.

Both are found on contrast pairs, responses that differ only in what is to be found: `clean`
without it, `marked` with it.

Detectors fire, z_i > τ_i, on marked responses and hardly ever on clean ones; τ_i is a quantile of
z_i on the clean side. They are picked greedily: each adds the most newly detected responses minus
newly raised false alarms, within a budget of false alarms for all of them together.

Carriers are the latents through which the reward model pays: the largest w_i · (mean z_i on
marked − mean z_i on clean). The two lists need not meet. A detector may have no weight in the
reward, so that zeroing it changes nothing, and still be the right thing to penalise.
"""

import dataclasses

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


def find_detectors(
    clean_nf: np.ndarray, marked_nf: np.ndarray, quantile: float, budget: float, most: int
) -> Detectors:
    """Calibrates τ on the clean latents `[N, M]` and covers the marked ones with ≤ `most` features.

    A threshold is never negative, so a latent that is merely active at all needs z > 0.
    """
    tau_f = np.maximum(np.quantile(clean_nf, quantile, axis=0), 0).astype(np.float32)
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
    return Detectors(
        features=tuple(chosen),
        tau=tuple(float(tau_f[i]) for i in chosen),
        detection=float(hit_n.mean()),
        false_alarms=float(alarm_n.mean()),
    )


def firing_rate(z_nf: np.ndarray, detectors: Detectors) -> float:
    """The share of responses `[N, M]` on which at least one detector fires."""
    return float((z_nf[:, list(detectors.features)] > detectors.tau).any(axis=1).mean())


def carried_reward(clean_nf: np.ndarray, marked_nf: np.ndarray, weight_f: np.ndarray) -> np.ndarray:
    """w_i · (mean z_i on marked − on clean) `[M]`: what each latent pays for the difference."""
    return weight_f * (marked_nf.mean(axis=0) - clean_nf.mean(axis=0))
