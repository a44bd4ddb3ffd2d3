"""Latents in plain arrays, where a test makes them by hand."""

from collections.abc import Sequence

import numpy as np

from sarm_jax.models.latent_store import Contrast


class DenseLatents:
    """Latents `[N, M]` that are in memory already."""

    def __init__(self, z_nf: np.ndarray):
        self.z_nf, self.size = z_nf, z_nf.shape[1]

    def __len__(self) -> int:
        return len(self.z_nf)

    def columns(self, ids: Sequence[int] | np.ndarray) -> np.ndarray:
        """Columns `[N, n]`."""
        return np.take(self.z_nf, ids, axis=1)


def dense_contrast(chosen_pf: np.ndarray, rejected_pf: np.ndarray) -> Contrast:
    """Two arrays `[P, M]`, the same row being the same pair."""
    count = len(chosen_pf)
    both = DenseLatents(np.concatenate([chosen_pf, rejected_pf]))
    return Contrast(both, np.arange(count), np.arange(count, 2 * count))
