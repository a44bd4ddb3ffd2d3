"""Latents in plain arrays, for tests that make them by hand."""

from collections.abc import Sequence

import numpy as np

from sarm_jax.models.latent_store import Contrast


class DenseLatents:
    """Latents `[N, M]` in memory."""

    def __init__(self, z_nf: np.ndarray):
        self.z_nf, self.size = z_nf, z_nf.shape[1]

    def __len__(self) -> int:
        return len(self.z_nf)

    def columns(self, ids: Sequence[int] | np.ndarray) -> np.ndarray:
        """Returns columns `[N, n]`."""
        return np.take(self.z_nf, ids, axis=1)


def dense_contrast(chosen_pf: np.ndarray, rejected_pf: np.ndarray) -> Contrast:
    """Makes a contrast from two arrays `[P, M]`; equal rows belong to the same pair."""
    count = len(chosen_pf)
    both = DenseLatents(np.concatenate([chosen_pf, rejected_pf]))
    return Contrast(both, np.arange(count), np.arange(count, 2 * count))
