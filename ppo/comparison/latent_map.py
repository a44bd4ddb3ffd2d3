"""Summaries of the latents of N responses that never build the array of N × M latents.

principal_plane   the first two principal components, from the N × N products of centred latents
largest_terms     the largest z_i · w_i in each score
sum_of_terms      the sum of all z_i · w_i of each score
"""

from collections.abc import Iterator

import numpy as np

from sarm_jax.models.latent_store import Latents, feature_blocks
from sarm_jax.reporting.spread import ROUNDING


def principal_plane(latents: Latents) -> tuple[np.ndarray, list[float]]:
    """Projects all responses onto the first two principal components of their latents.

    The sign of a component is such that its largest coordinate is positive.

    Returns:
        Coordinates `[N, 2]`, and the two shares of the variance; a component that does not exist
        has coordinates and share 0.
    """
    count = len(latents)
    gram_nn, size = np.zeros((count, count)), 0.0
    for _, z_nb in _active_blocks(latents):
        centred_nb = z_nb - z_nb.mean(axis=0)
        gram_nn += centred_nb @ centred_nb.T
        size += float(np.square(z_nb).sum())
    if np.trace(gram_nn) <= ROUNDING**2 * size:  # equal latents, of which rounding is left
        gram_nn[...] = 0
    value_n, vector_nn = np.linalg.eigh(gram_nn)
    value_k = np.maximum(value_n[::-1][:2], 0)
    xy_nk = vector_nn[:, ::-1][:, :2] * np.sqrt(value_k)
    largest_k = np.abs(xy_nk).argmax(axis=0)
    xy_nk = xy_nk * np.where(xy_nk[largest_k, np.arange(len(value_k))] < 0, -1.0, 1.0)
    total = float(np.trace(gram_nn))
    shares = [float(value / total) if total > 0 else 0.0 for value in value_k]
    missing = 2 - len(shares)
    return np.pad(xy_nk, ((0, 0), (0, missing))), shares + [0.0] * missing


def largest_terms(latents: Latents, weight_f: np.ndarray, count: int) -> list[list[list]]:
    """Returns the largest terms of the score of every response.

    Args:
        latents: the latents of N responses.
        weight_f: the weights w of the linear head.
        count: the number of terms per response.

    Returns:
        For each response rows [feature, z, w, z·w] in float64, the largest |z·w| first, without
        terms that are 0.
    """
    term_nk, z_nk = np.zeros((len(latents), 0)), np.zeros((len(latents), 0))
    id_nk = np.zeros((len(latents), 0), int)
    for ids, z_nb in _active_blocks(latents):
        # The k largest terms of the blocks so far and the terms of this block: c candidates.
        z_nc = np.concatenate([z_nk, z_nb], axis=1)
        id_nc = np.concatenate([id_nk, np.broadcast_to(ids, z_nb.shape)], axis=1)
        term_nc = np.concatenate([term_nk, z_nb * weight_f[ids].astype(np.float64)], axis=1)
        largest_nk = np.argsort(-np.abs(term_nc), axis=1, kind="stable")[:, :count]
        term_nk = np.take_along_axis(term_nc, largest_nk, axis=1)
        id_nk = np.take_along_axis(id_nc, largest_nk, axis=1)
        z_nk = np.take_along_axis(z_nc, largest_nk, axis=1)
    return [
        [
            [int(i), float(z), float(weight_f[i]), float(term)]
            for i, z, term in zip(id_k, z_k, term_k, strict=True)
            if term != 0
        ]
        for id_k, z_k, term_k in zip(id_nk, z_nk, term_nk, strict=True)
    ]


def sum_of_terms(latents: Latents, weight_f: np.ndarray) -> np.ndarray:
    """Returns Σ_i z_i w_i of every response, float64 `[N]`."""
    sum_n = np.zeros(len(latents))
    for ids, z_nb in _active_blocks(latents):
        sum_n += z_nb @ weight_f[ids].astype(np.float64)
    return sum_n


def _active_blocks(latents: Latents) -> Iterator[tuple[np.ndarray, np.ndarray]]:
    """Yields blocks of (feature ids, columns in float64), without features that are always 0."""
    for ids in feature_blocks(latents.size, len(latents)):
        z_nb = latents.columns(ids)
        active_b = z_nb.any(axis=0)
        if active_b.any():
            yield ids[active_b], z_nb[:, active_b].astype(np.float64)
