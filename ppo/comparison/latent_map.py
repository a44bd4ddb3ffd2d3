"""What all latents of many responses come down to, without an array of N × M.

principal_plane   the first two principal components, from the N × N products of centred latents
largest_terms     the z_i · w_i that weigh most in each score
"""

import numpy as np

from sarm_jax.models.latent_store import Latents, feature_blocks


def principal_plane(latents: Latents) -> tuple[np.ndarray, list[float]]:
    """(coordinates `[N, 2]`, the shares of variance explained); a missing component is 0.

    The sign of a component is such that its largest coordinate is positive.
    """
    count = len(latents)
    gram_nn = np.zeros((count, count))
    for _, z_nb in _active_blocks(latents):
        centred_nb = z_nb - z_nb.mean(axis=0)
        gram_nn += centred_nb @ centred_nb.T
    value_n, vector_nn = np.linalg.eigh(gram_nn)
    value_k = np.maximum(value_n[::-1][:2], 0)
    xy_nk = vector_nn[:, ::-1][:, :2] * np.sqrt(value_k)
    largest_k = np.abs(xy_nk).argmax(axis=0)
    xy_nk = xy_nk * np.where(xy_nk[largest_k, np.arange(len(value_k))] < 0, -1.0, 1.0)
    total = float(np.trace(gram_nn))
    share = [float(v / total) if total > 0 else 0.0 for v in value_k]
    missing = 2 - len(share)
    return np.pad(xy_nk, ((0, 0), (0, missing))), share + [0.0] * missing


def largest_terms(latents: Latents, weight_f: np.ndarray, count: int) -> list[list[list]]:
    """Of every response [feature, z, w, z·w], the largest |z·w| first, float64; zeros left out."""
    best_nk = np.zeros((len(latents), 0))
    id_nk, z_nk = np.zeros((len(latents), 0), int), np.zeros((len(latents), 0))
    for ids, z_nb in _active_blocks(latents):
        all_z = np.concatenate([z_nk, z_nb], axis=1)
        all_id = np.concatenate([id_nk, np.broadcast_to(ids, z_nb.shape)], axis=1)
        term_nc = np.concatenate([best_nk, z_nb * weight_f[ids].astype(np.float64)], axis=1)
        chosen = np.argsort(-np.abs(term_nc), axis=1, kind="stable")[:, :count]
        best_nk, id_nk, z_nk = (np.take_along_axis(a, chosen, 1) for a in (term_nc, all_id, all_z))
    return [
        [
            [int(i), float(z), float(weight_f[i]), float(term)]
            for i, z, term in zip(*row, strict=True)
            if term != 0
        ]
        for row in zip(id_nk, z_nk, best_nk, strict=True)
    ]


def _active_blocks(latents: Latents):
    """(ids, their columns in float64), features that are 0 throughout left out."""
    for ids in feature_blocks(latents.size, len(latents)):
        z_nb = latents.columns(ids)
        active_b = z_nb.any(axis=0)
        if active_b.any():
            yield ids[active_b], z_nb[:, active_b].astype(np.float64)
