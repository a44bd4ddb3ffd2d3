"""Features with similar decoder rows: what a policy may turn to instead of a penalised feature."""

from collections.abc import Sequence

import numpy as np

from sarm_jax.models.sae import SAE
from sarm_jax.parallel.processes import fetch

NEIGHBOURS = 5  # of each feature


def decoder_directions(sae: SAE) -> np.ndarray:
    """Returns the decoder rows scaled to length 1, float32 `[M, D]`."""
    decoder_fd = np.asarray(fetch(sae.decoder[...]), np.float32)
    # By a power of two, so that no square overflows or vanishes and no digit changes.
    exponent_f1 = np.frexp(np.abs(decoder_fd).max(axis=1, keepdims=True))[1]
    decoder_fd = np.ldexp(decoder_fd, -exponent_f1)
    return decoder_fd / np.maximum(np.linalg.norm(decoder_fd, axis=1, keepdims=True), 1e-12)


def nearest_features(direction_fd: np.ndarray, ids: Sequence[int]) -> list[list[tuple[int, float]]]:
    """Finds the features whose decoder rows have the largest cosine with that of each of `ids`.

    Args:
        direction_fd: the result of `decoder_directions`.
        ids: the features.

    Returns:
        For each of `ids` pairs (feature, cosine), at most `NEIGHBOURS`, the most similar first.
    """
    neighbours = []
    for i in ids:
        cosine_f = direction_fd @ direction_fd[i]
        cosine_f[i] = -np.inf
        nearest = np.argsort(-cosine_f, kind="stable")[:NEIGHBOURS]
        neighbours.append([(int(n), float(cosine_f[n])) for n in nearest if n != i])
    return neighbours
