"""Dense probes: linear detectors of a property on the pooled state that the SAE reads.

    fires on h if p · h > τ                       h: the pooled state; p: a direction of length 1

    logistic         p ∝ argmin_w mean log(1 + exp(−y (w · x + b))) + λ/2 |w|²     y: ±1
    mean_difference  p ∝ mean of h on marked responses − mean of h on clean ones

x is h centred and divided by the root mean square of its distance from the mean, so that λ does not
depend on the scale of the states. With λ → ∞ the first direction becomes the second.

A probe is a rival of the detectors (`sarm_jax.features.detectors`): it is fitted on the same pairs,
with the same budget of false positives and the same folds of prompts for its held-out rates, but it
needs no SAE. τ is the quantile 1 − budget of p · h on clean
responses. Source: Alain and Bengio 1610.01644 (linear probes); difference of means as in Marks and
Tegmark 2310.06824.
"""

import dataclasses
import math
from collections.abc import Sequence
from functools import partial
from pathlib import Path

import numpy as np
from safetensors.numpy import save
from scipy.optimize import minimize
from scipy.special import expit

from sarm_jax.features.detectors import cross_validated_rates
from sarm_jax.io.errors import InputError
from sarm_jax.io.files import replacing
from sarm_jax.io.tensor_files import read_float_tensors
from sarm_jax.models.latent_store import Contrast
from sarm_jax.parallel.finite import require_finite

LOGISTIC, MEAN_DIFFERENCE = "logistic", "mean_difference"
KINDS = (LOGISTIC, MEAN_DIFFERENCE)
STEPS = 1000  # most iterations of L-BFGS


@dataclasses.dataclass(frozen=True)
class DenseProbe:
    """A direction `[D]` float32 of length 1, and the threshold τ of the projection on it."""

    direction_d: np.ndarray
    tau: float

    def margin(self, x_nd: np.ndarray) -> np.ndarray:
        """Returns p · h − τ of states `[N, D]`, float32 `[N]`; the probe fires if it is above 0."""
        return (projection(x_nd, self.direction_d) - self.tau).astype(np.float32)


class States:
    """A store of pooled states `[N, D]`, whose columns are the dimensions."""

    def __init__(self, x_nd: np.ndarray):
        self.x_nd, self.size = x_nd, x_nd.shape[1]

    def __len__(self) -> int:
        return len(self.x_nd)

    def columns(self, ids: Sequence[int] | np.ndarray) -> np.ndarray:
        """Returns columns `[N, f]`."""
        return self.x_nd[:, np.asarray(ids, np.int64)]


@dataclasses.dataclass(frozen=True)
class FittedProbe:
    """A probe with its rates on the pairs that it was fitted on, and on held-out prompts."""

    probe: DenseProbe
    detection_rate: float
    false_positive_rate: float
    held_out: tuple[float, float]


def fit_probe(
    kind: str, contrast: Contrast, fold_p: np.ndarray, *, budget: float, l2: float
) -> FittedProbe:
    """Fits a probe on all pairs, and measures it by cross-validation as well.

    Args:
        kind: "logistic" or "mean_difference".
        contrast: pairs of clean and marked responses, over a store of states.
        fold_p: number of the fold of each pair.
        budget: share of the clean responses on which the probe may fire.
        l2: λ of the logistic regression.

    Raises:
        InputError: the states of both sides are the same, so that there is no direction.
    """
    fit = partial(_fit, kind, budget=budget, l2=l2)

    def rates(training: Contrast, held_out: Contrast) -> tuple[float, float]:
        return _rates(fit(training), held_out)

    probe = fit(contrast)
    detection, false_positives = _rates(probe, contrast)
    held_out = cross_validated_rates(contrast, fold_p, rates)
    return FittedProbe(probe, detection, false_positives, held_out)


def _fit(kind: str, contrast: Contrast, *, budget: float, l2: float) -> DenseProbe:
    clean_pd, marked_pd = contrast.sides(_states(contrast))
    if kind == LOGISTIC:
        direction_d = logistic_direction(clean_pd, marked_pd, l2)
    else:
        direction_d = marked_pd.mean(axis=0, dtype=np.float64) - clean_pd.mean(
            axis=0, dtype=np.float64
        )
    length = np.linalg.norm(direction_d)
    if not (np.isfinite(length) and length > 0):
        raise InputError(
            f"identify.pairs_jsonl: the states of the chosen and of the rejected responses of "
            f"{len(contrast)} pairs have the same mean: a probe has no direction"
        )
    unit_d = (direction_d / length).astype(np.float32)
    quantile = np.quantile(projection(clean_pd, unit_d), 1 - budget)
    tau = np.float32(quantile)
    if tau < quantile:  # rounded up, so that a response at the quantile does not fire
        tau = np.nextafter(tau, np.float32("inf"))
    return DenseProbe(unit_d, float(tau))


def projection(x_nd: np.ndarray, direction_d: np.ndarray) -> np.ndarray:
    """Returns p · h of states `[N, D]`, float64 `[N]`.

    It is computed row by row, so that a response's value does not depend on the other rows.
    """
    return (x_nd.astype(np.float64) * direction_d).sum(axis=1)


def _states(contrast: Contrast) -> np.ndarray:
    assert isinstance(contrast.latents, States)
    return contrast.latents.x_nd


def logistic_direction(clean_pd: np.ndarray, marked_pd: np.ndarray, l2: float) -> np.ndarray:
    """Returns the weights `[D]` of a logistic regression of the side on the state."""
    x_nd = np.concatenate([clean_pd, marked_pd]).astype(np.float64)
    y_n = np.repeat([-1.0, 1.0], [len(clean_pd), len(marked_pd)])
    x_nd -= x_nd.mean(axis=0)
    size = math.sqrt(np.square(x_nd).sum(axis=1).mean())
    if size == 0:
        return x_nd[0]
    x_nd /= size

    def loss(parameters: np.ndarray) -> tuple[float, np.ndarray]:
        w_d, bias = parameters[:-1], parameters[-1]
        margin_n = y_n * (x_nd @ w_d + bias)
        slope_n = -y_n * expit(-margin_n) / len(y_n)
        value = np.logaddexp(0, -margin_n).mean() + 0.5 * l2 * (w_d @ w_d)
        return value, np.append(slope_n @ x_nd + l2 * w_d, slope_n.sum())

    options = {"maxiter": STEPS, "gtol": 1e-8, "ftol": 1e-14}
    start = np.zeros(x_nd.shape[1] + 1)
    return minimize(loss, start, jac=True, method="L-BFGS-B", options=options).x[:-1]


def _rates(probe: DenseProbe, contrast: Contrast) -> tuple[float, float]:
    """Returns the shares of marked and of clean responses on which the probe fires."""
    clean_pd, marked_pd = contrast.sides(_states(contrast))
    return float((probe.margin(marked_pd) > 0).mean()), float((probe.margin(clean_pd) > 0).mean())


def probe_file(kind: str) -> str:
    """Returns the name of the file of a probe in the folder probes of a run."""
    return f"dense_probe_{kind}.safetensors"


def save_probe(path: str | Path, probe: DenseProbe) -> None:
    """Writes `direction [D]` and `tau [1]`, float32, under a temporary name, and renames the file.

    Raises:
        InputError: a number is not finite.
    """
    tensors = {"direction": probe.direction_d, "tau": np.asarray([probe.tau], np.float32)}
    require_finite(tensors, path)
    with replacing(path, "wb") as file:
        file.write(save(tensors))


def load_probe(path: str | Path) -> DenseProbe:
    """Reads a file of `save_probe`.

    Raises:
        InputError: the file is not there, not safetensors, or no probe.
    """
    place = f"reward.probe={path}"
    ranks = {"direction": 1, "tau": 1}
    tensors = read_float_tensors(path, ranks, place=place, maker="--stage=train_probe")
    direction_d, tau_1 = (tensors[name].astype(np.float64) for name in ranks)
    if len(tau_1) != 1:
        raise InputError(f"{place}: tau has the shape {tau_1.shape}, expected (1,)")
    length = float(np.linalg.norm(direction_d))
    if not abs(length - 1) < 1e-3:
        raise InputError(f"{place}: direction has the length {length:.6g}, expected 1")
    return DenseProbe(direction_d.astype(np.float32), float(tau_1[0]))
