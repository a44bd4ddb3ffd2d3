"""Responses on the two principal components of their latents, by singular value decomposition."""

import numpy as np


def principal_plane(z_nf: np.ndarray) -> tuple[np.ndarray, list[float]]:
    """(coordinates `[N, 2]`, the shares of variance explained); a missing component is 0.

    The sign of a component is such that its largest loading is positive.
    """
    centred_nf = z_nf.astype(np.float64) - z_nf.mean(axis=0, dtype=np.float64)
    u_nk, s_k, v_kf = np.linalg.svd(centred_nf, full_matrices=False)
    largest_k = np.abs(v_kf).argmax(axis=1)
    sign_k = np.where(v_kf[np.arange(len(v_kf)), largest_k] < 0, -1.0, 1.0)
    xy_nk = (u_nk * s_k * sign_k)[:, :2]
    total = float((s_k**2).sum())
    share = [float(s * s / total) if total else 0.0 for s in s_k[:2]]
    missing = 2 - len(share)
    return np.pad(xy_nk, ((0, 0), (0, missing))), share + [0.0] * missing
