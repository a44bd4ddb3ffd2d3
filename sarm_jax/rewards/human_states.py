"""The distance of a response's pooled state from those of human responses.

    d(h) = √((h − μ)ᵀ Σ⁻¹ (h − μ))                     Mahalanobis distance
    Σ    = (1 − s) S + s m I,   m = tr S / D            shrunk covariance
    s    = min(1, Σ_i ‖x_i x_iᵀ − S‖² / (N² ‖S − m I‖²))

μ and S are the mean and the covariance of N human states, and x_i = h_i − μ. The reward takes
`distance_penalty` · d(h), linear in the distance, from a response.

Sources: the regularisation IBL of InfoRM's authors (Miao et al. 2510.13694), which penalises the
Mahalanobis distance from the responses of the SFT model in the latent space of a reward model;
Ledoit and Wolf, "A well-conditioned estimator for large-dimensional covariance matrices" (2004),
for s. Deliberate deviations: the state is the reward model's pooled state, not a variational
bottleneck, and the distribution is that of human responses.

The file has `mean [D]`, `axes [R, D]` with the eigenvectors of S whose eigenvalue is not 0,
`variance [R]` of Σ along them, and `floor [1]`, the variance s m of Σ along all other directions.
"""

import dataclasses
import logging
from pathlib import Path

import numpy as np
from safetensors.numpy import save

from sarm_jax.io.errors import InputError
from sarm_jax.io.files import replacing
from sarm_jax.io.tensor_files import read_float_tensors
from sarm_jax.parallel.finite import require_finite

LOG = logging.getLogger(__name__)
STATES_FILE = "human_states.safetensors"  # in the working directory
MAKER = "--stage=human_latents --config.human_latents.states=True"
RANKS = {"mean": 1, "axes": 2, "variance": 1, "floor": 1}
FOLDS = 4  # parts that are left out of the estimate in turn, for the distances that are logged
NO_VARIANCE = 1e-12  # an eigenvalue below this share of the largest one counts as 0


@dataclasses.dataclass(frozen=True)
class HumanStates:
    """Mean and shrunk covariance of human states, float64; see the module for the tensors."""

    mean_d: np.ndarray
    axes_rd: np.ndarray
    variance_r: np.ndarray
    floor: float

    def distance(self, x_nd: np.ndarray) -> np.ndarray:
        """Returns d(h) of states `[N, D]`, float32 `[N]`."""
        # Row by row, so that a response's distance does not depend on the others of its batch.
        rows = [self._distance(x_d) for x_d in x_nd.astype(np.float64)]
        return np.asarray(rows, np.float32)

    def _distance(self, x_d: np.ndarray) -> float:
        centred_d = x_d - self.mean_d
        along_r = self.axes_rd @ centred_d
        outside_d = centred_d - along_r @ self.axes_rd
        return np.sqrt((along_r**2 / self.variance_r).sum() + (outside_d**2).sum() / self.floor)


def fit_human_states(x_nd: np.ndarray, source: str) -> HumanStates:
    """Estimates mean and covariance of states `[N, D]`; `source` names them in messages.

    Logs the distances of states that were left out of the estimate (`FOLDS` folds): those that it
    was made from are much closer to it unless N is far above D.

    Raises:
        InputError: a state is not finite, or the states are too few or too much alike for a
            covariance that can be inverted.
    """
    require_finite({"states": x_nd}, source)
    human = _fit(x_nd, source)
    fold_n = np.arange(len(x_nd)) % FOLDS
    distances = [_fit(x_nd[fold_n != k], source).distance(x_nd[fold_n == k]) for k in range(FOLDS)]
    low, high = np.quantile(np.concatenate(distances), [0.5, 0.95])
    LOG.info(
        "states of %d human responses: left out of the estimate, they have a median distance of "
        "%.3g, 95 %% below %.3g",
        len(x_nd), low, high,
    )  # fmt: skip
    return human


def _fit(x_nd: np.ndarray, source: str) -> HumanStates:
    """Estimates mean and covariance, see `fit_human_states`."""
    count, size = x_nd.shape
    x_nd = x_nd.astype(np.float64)
    mean_d = x_nd.mean(axis=0)
    x_nd = x_nd - mean_d
    _, singular_r, axes_rd = np.linalg.svd(x_nd, full_matrices=False)
    eigenvalue_r = singular_r**2 / count
    mean_variance = eigenvalue_r.sum() / size
    squares = np.square(eigenvalue_r).sum()  # ‖S‖²
    from_sphere = squares - size * mean_variance**2  # ‖S − m I‖²
    errors = np.square(np.square(x_nd).sum(axis=1)).sum() - count * squares
    shrinkage = min(1.0, errors / (count**2 * from_sphere)) if from_sphere > 0 else 1.0
    floor = shrinkage * mean_variance
    if not floor > NO_VARIANCE * eigenvalue_r.max(initial=0.0):
        raise InputError(
            f"{source}: the states of {count} responses have no covariance that can be inverted: "
            "give more and different responses"
        )
    kept_r = eigenvalue_r > NO_VARIANCE * eigenvalue_r[0]
    return HumanStates(
        mean_d,
        axes_rd[kept_r],
        (1 - shrinkage) * eigenvalue_r[kept_r] + floor,
        float(floor),
    )


def save_human_states(path: str | Path, human: HumanStates) -> None:
    """Writes the file atomically; raises InputError for numbers that are not finite."""
    arrays = (human.mean_d, human.axes_rd, human.variance_r, np.asarray([human.floor]))
    tensors = {
        name: np.ascontiguousarray(array, np.float32)
        for name, array in zip(RANKS, arrays, strict=True)
    }
    require_finite(tensors, path)
    with replacing(path, "wb") as file:
        file.write(save(tensors))


def load_human_states(path: str | Path) -> HumanStates:
    """Reads the file, and checks its shapes, types and values.

    Raises:
        InputError: the file is not there, not safetensors, or no mean and covariance.
    """
    place = f"reward.human_states={path}"
    tensors = read_float_tensors(path, RANKS, place=place, maker=MAKER)
    mean_d, axes_rd, variance_r, floor_1 = (tensors[name].astype(np.float64) for name in RANKS)
    if axes_rd.shape != (len(variance_r), len(mean_d)) or len(floor_1) != 1:
        shapes = ", ".join(f"{name} {tensors[name].shape}" for name in RANKS)
        raise InputError(f"{place}: the shapes do not belong together: {shapes}")
    length_r = np.linalg.norm(axes_rd, axis=1)
    wrong_r = np.abs(length_r - 1) >= 1e-3
    if wrong_r.any():
        raise InputError(
            f"{place}: axes has a row of length {length_r[wrong_r][0]:.6g}, expected 1"
        )
    for name, values in (("variance", variance_r), ("floor", floor_1)):
        if not (values > 0).all():
            raise InputError(f"{place}: {name} holds {values.min():.6g}, expected positive numbers")
    return HumanStates(mean_d, axes_rd, variance_r, float(floor_1[0]))
