"""Stores the pooled latents of many responses without an array of N × M.

A TopK code of k values with their indices takes 8 k bytes per response and loses nothing. It is
sorted by feature, so that a few columns at a time can be made dense. Without TopK any number of
latents may be active. The pooled trunk states x `[N, D]` are then kept, and columns are encoded on
request. The trunk never runs twice. (Suffixes here: n response, f requested feature, p pair.)
"""

import dataclasses
from collections.abc import Iterator, Sequence
from typing import Protocol

import jax.numpy as jnp
import numpy as np

from sarm_jax.models.sae import SAE
from sarm_jax.parallel.processes import fetch

BLOCK_BYTES = 64 << 20  # of a dense block of columns
MIN_BLOCK = 8  # columns; NumPy sums a single column in another order


class Latents(Protocol):
    """A store of N rows and `size` features that returns columns `[N, f]` in float32."""

    size: int

    def columns(self, ids: Sequence[int] | np.ndarray) -> np.ndarray: ...

    def __len__(self) -> int: ...


class TopKLatents:
    """A store of TopK codes: `values [N, k]` and `indices [N, k]` of `size` features."""

    def __init__(self, values_nk: np.ndarray, indices_nk: np.ndarray, size: int):
        self.size, (self.rows, k) = size, values_nk.shape
        flat = indices_nk.ravel()
        order = np.argsort(flat, kind="stable")
        self._row = (order // k).astype(np.int32)
        self._value = values_nk.ravel()[order].astype(np.float32)
        self._start = np.searchsorted(flat[order], np.arange(size + 1))

    def __len__(self) -> int:
        return self.rows

    def columns(self, ids: Sequence[int] | np.ndarray) -> np.ndarray:
        """Returns dense columns `[N, f]`."""
        z_nf = np.zeros((self.rows, len(ids)), np.float32)
        for column, i in enumerate(ids):
            active = slice(self._start[i], self._start[i + 1])
            z_nf[self._row[active], column] = self._value[active]
        return z_nf


class EncodedLatents:
    """A store of pooled states `[N, D]`, for an SAE without TopK."""

    def __init__(self, x_nd: np.ndarray, sae: SAE):
        self.x_nd, self.sae, self.size = x_nd, sae, sae.config.latent_size

    def __len__(self) -> int:
        return len(self.x_nd)

    def columns(self, ids: Sequence[int] | np.ndarray) -> np.ndarray:
        """Returns dense columns `[N, f]`."""
        z_nf = self.sae.columns(jnp.asarray(self.x_nd), jnp.asarray(ids, jnp.int32))
        return np.asarray(fetch(z_nf), np.float32)


@dataclasses.dataclass(frozen=True)
class Contrast:
    """Pairs of responses as row numbers `[P]` of a store: chosen (clean) and rejected (marked)."""

    latents: Latents
    chosen_p: np.ndarray
    rejected_p: np.ndarray

    def __len__(self) -> int:
        return len(self.chosen_p)

    @property
    def size(self) -> int:
        """The number of features."""
        return self.latents.size

    def subset(self, keep_p: np.ndarray) -> "Contrast":
        """Returns the pairs that `keep_p` `[P]`, a mask or row numbers, selects."""
        return Contrast(self.latents, self.chosen_p[keep_p], self.rejected_p[keep_p])

    def columns(self, ids: Sequence[int] | np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """Returns the columns `[P, f]` of the chosen and of the rejected side."""
        return self.sides(self.latents.columns(ids))

    def sides(self, z_nf: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """Splits columns `[N, f]` of all rows into the chosen and the rejected side, `[P, f]`."""
        return z_nf[self.chosen_p], z_nf[self.rejected_p]

    def blocks(self) -> Iterator[tuple[np.ndarray, np.ndarray, np.ndarray]]:
        """Yields (ids, chosen `[P, f]`, rejected `[P, f]`) for blocks that cover every feature."""
        for ids, z_nf in self.latents_by_block():
            yield ids, *self.sides(z_nf)

    def latents_by_block(self) -> Iterator[tuple[np.ndarray, np.ndarray]]:
        """Yields (ids, columns `[N, f]` of all rows) for blocks that cover every feature."""
        for ids in feature_blocks(self.size, max(len(self.latents), len(self))):
            yield ids, self.latents.columns(ids)


def feature_blocks(size: int, rows: int) -> Iterator[np.ndarray]:
    """Yields the feature ids 0 … size − 1, as many at a time as fit a block of `rows` rows."""
    width = max(MIN_BLOCK, BLOCK_BYTES // (4 * max(rows, 1)))
    starts = list(range(0, size, width))
    if len(starts) > 1 and size - starts[-1] < MIN_BLOCK:
        starts.pop()
    for start, stop in zip(starts, [*starts[1:], size], strict=True):
        yield np.arange(start, stop)
