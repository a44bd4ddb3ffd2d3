"""The pooled latents of many responses, without an array of N × M.

A TopK code is k values with their indices, 8 k bytes per response, and nothing is lost. It is kept
sorted by feature, so that a few columns can be made dense at a time. Without TopK every latent is
active; then the pooled trunk states x `[N, D]` are kept, and columns are encoded when asked for:
    z[:, ids] = (x − b_pre) W_enc[:, ids] + b_latent[ids]
The trunk never runs twice.
"""

import dataclasses
from collections.abc import Iterator, Sequence
from typing import Protocol

import jax.numpy as jnp
import numpy as np

from sarm_jax.models.sae import SAE

BLOCK_BYTES = 64 << 20  # of one side's dense block of columns
MIN_BLOCK = 8  # columns: NumPy sums a single column in another order


class Latents(Protocol):
    """What `Contrast` asks of a store: N rows, `size` features, some columns `[N, n]` float32."""

    size: int

    def columns(self, ids: Sequence[int] | np.ndarray) -> np.ndarray: ...

    def __len__(self) -> int: ...


class TopKLatents:
    """Codes `values [N, k]` and `indices [N, k]` of `size` features."""

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
        """Dense columns `[N, n]`."""
        z_nb = np.zeros((self.rows, len(ids)), np.float32)
        for place, i in enumerate(ids):
            part = slice(self._start[i], self._start[i + 1])
            z_nb[self._row[part], place] = self._value[part]
        return z_nb


class EncodedLatents:
    """Pooled states `[N, D]` of a model whose SAE keeps every pre-activation."""

    def __init__(self, x_nd: np.ndarray, sae: SAE):
        self.x_nd, self.sae, self.size = x_nd, sae, sae.config.latent_size

    def __len__(self) -> int:
        return len(self.x_nd)

    def columns(self, ids: Sequence[int] | np.ndarray) -> np.ndarray:
        """Dense columns `[N, n]`."""
        where = jnp.asarray(ids, jnp.int32)
        encoder = self.sae.encoder[...][:, where]
        centred = (jnp.asarray(self.x_nd) - self.sae.pre_bias[...]).astype(encoder.dtype)
        a_nb = jnp.einsum("nd,db->nb", centred, encoder, preferred_element_type=jnp.float32)
        return np.asarray(a_nb + self.sae.latent_bias[...][where], np.float32)


@dataclasses.dataclass(frozen=True)
class Contrast:
    """Pairs of responses: row numbers `[P]` of the store, chosen (clean) and rejected (marked)."""

    latents: Latents
    chosen_p: np.ndarray
    rejected_p: np.ndarray

    def __len__(self) -> int:
        return len(self.chosen_p)

    @property
    def size(self) -> int:
        return self.latents.size

    def subset(self, keep_p: np.ndarray) -> "Contrast":
        """The pairs that `keep_p` `[P]` says."""
        return Contrast(self.latents, self.chosen_p[keep_p], self.rejected_p[keep_p])

    def columns(self, ids: Sequence[int] | np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """The columns `[P, n]` of either side."""
        return self.sides(self.latents.columns(ids))

    def sides(self, z_nb: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """Of columns of all rows `[N, n]` those of either side, `[P, n]`."""
        return z_nb[self.chosen_p], z_nb[self.rejected_p]

    def blocks(self) -> Iterator[tuple[np.ndarray, np.ndarray, np.ndarray]]:
        """(ids, chosen `[P, b]`, rejected `[P, b]`) until every feature has had its turn."""
        for ids, z_nb in self.latents_by_block():
            yield ids, *self.sides(z_nb)

    def latents_by_block(self) -> Iterator[tuple[np.ndarray, np.ndarray]]:
        """(ids, the columns `[N, b]` of all rows) until every feature has had its turn."""
        for ids in feature_blocks(self.size, max(len(self.latents), len(self))):
            yield ids, self.latents.columns(ids)


def feature_blocks(size: int, rows: int) -> Iterator[np.ndarray]:
    """The feature ids 0 … size − 1, as many at a time as fit a block of that many rows."""
    width = max(MIN_BLOCK, BLOCK_BYTES // (4 * rows))
    starts = list(range(0, size, width))
    if len(starts) > 1 and size - starts[-1] < MIN_BLOCK:
        starts.pop()
    for start, stop in zip(starts, [*starts[1:], size], strict=True):
        yield np.arange(start, stop)
