"""Trunk states of tokens, the activations that an SAE is trained on: collected to files, and read.

Tokens may be many, and their states are wide: 10 million states of a model of 8 billion parameters
take 164 GB. They are therefore written to files as the trunk computes them
(`sarm_jax.io.matrix_files`), and no function here or in the training holds more than a batch, or
`PIECE_BYTES` of them. A piece at a time gives the same numbers as all at once, bit for bit, except
for float64 sums of more than one piece.

On several hosts every process has files of its own with all rows, since each batch is a random
sample of them, and reads of a batch the rows of its own devices.
"""

import contextlib
import dataclasses
import logging
import tempfile
from collections.abc import Iterator, Sequence
from functools import partial
from pathlib import Path
from typing import Any, Protocol

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from jax.stages import Lowered
from tqdm import tqdm

from sarm_jax.io.errors import InputError, first_line
from sarm_jax.io.matrix_files import (
    MatrixFiles,
    open_matrix,
    remove_matrix,
    writing_matrix,
)
from sarm_jax.models.chat import pad_batch, scored_length
from sarm_jax.models.llama import Llama
from sarm_jax.models.sae import standardise
from sarm_jax.parallel import processes
from sarm_jax.parallel.compilation import compile_programs
from sarm_jax.parallel.finite import FiniteCheck
from sarm_jax.parallel.sharding import Placement
from sarm_jax.reporting.spread import is_constant

LOG = logging.getLogger(__name__)
TOKENS_PER_BATCH = 2048  # in one forward pass of the trunk
PIECE_BYTES = 64 << 20  # of the rows that are read at a time, if all are read
BLOCK = 1024  # rows; the number of rows of a piece is a multiple of it


class Rows(Protocol):
    """Rows `[N, D]` in float32 that an index or a slice reads; an array has them in memory."""

    @property
    def shape(self) -> tuple[int, ...]: ...

    def __len__(self) -> int: ...

    def __getitem__(self, index: Any, /) -> Any: ...


@dataclasses.dataclass(frozen=True)
class SelectedRows:
    """Some rows of other rows, which are read when they are asked for.

    Attributes:
        x_nd: the other rows.
        row_r: the row numbers there `[R]`.
    """

    x_nd: Rows
    row_r: np.ndarray

    @property
    def shape(self) -> tuple[int, ...]:
        """R and D."""
        return len(self), self.x_nd.shape[1]

    def __len__(self) -> int:
        return len(self.row_r)

    def __getitem__(self, index: Any) -> np.ndarray:
        return self.x_nd[self.row_r[index]]


@dataclasses.dataclass(frozen=True)
class Conversation:
    """The token ids of an exchange; the last `turn_length` of them are the assistant turn."""

    ids: list[int]
    turn_length: int


@dataclasses.dataclass(frozen=True)
class Activations:
    """Trunk states of tokens in the order of the conversations.

    Attributes:
        x_nd: states `[N, D]` float32.
        pooled_n: `[N]` bool, True for the last token of each conversation, which the head reads.
    """

    x_nd: Rows
    pooled_n: np.ndarray

    @property
    def pooled(self) -> SelectedRows:
        """The pooled states `[R, D]`, one of each conversation, where they are."""
        return SelectedRows(self.x_nd, np.flatnonzero(self.pooled_n))

    @property
    def pooled_rd(self) -> np.ndarray:
        """The pooled states `[R, D]` in memory."""
        return read_rows(self.pooled, slice(None))

    def select(self, keep_n: np.ndarray) -> "Activations":
        """Selects the states that `keep_n` `[N]` marks, without reading them."""
        return Activations(SelectedRows(self.x_nd, np.flatnonzero(keep_n)), self.pooled_n[keep_n])


def read_rows(x_nd: Rows, index: Any) -> np.ndarray:
    """Reads rows; if they are damaged in one process, all end. All processes have to call it."""
    with processes.raising_on_all():
        return x_nd[index]


def pieces(x_nd: Rows) -> Iterator[np.ndarray]:
    """Yields all rows in order, a multiple of `BLOCK` at a time. All processes have to call it."""
    rows = max(PIECE_BYTES // (4 * x_nd.shape[1]) // BLOCK, 1) * BLOCK
    for start in range(0, len(x_nd), rows):
        yield read_rows(x_nd, slice(start, start + rows))


def mean_row(x_nd: Rows, dtype: Any = np.float32) -> np.ndarray:
    """Computes the mean of the rows `[D]` in float32 or float64, as `np.mean(x_nd, axis=0)` does.

    NumPy sums along the first axis row by row. The sum over the pieces goes on in the same order.
    """
    total_d: np.ndarray | None = None
    for x_kd in pieces(x_nd):
        before = [] if total_d is None else [total_d[None]]
        total_d = np.add.reduce(np.concatenate([*before, x_kd]), axis=0, dtype=dtype)
    assert total_d is not None
    return np.true_divide(total_d, np.intp(len(x_nd)), out=total_d, casting="unsafe")


def all_equal(x_nd: Rows) -> bool:
    """Returns True if the rows are equal up to rounding. Reads no more than it takes to know."""
    low_d, high_d = np.float32(np.inf), np.float32(-np.inf)
    for x_kd in pieces(x_nd):
        low_d, high_d = np.minimum(low_d, x_kd.min(axis=0)), np.maximum(high_d, x_kd.max(axis=0))
        # Further rows only widen the range, and a range that is too wide stays so.
        if not is_constant(np.stack([low_d, high_d]), axis=0).all():
            return False
    return True


class ActivationFolder:
    """The folder of the activations of a training, which has a subfolder for each collection.

    Args:
        folder: the folder, in the working directory of this process.
        made_from: a JSON value with all that the activations depend on, except for the name of a
            collection; None: no collection is used again by a later call.
    """

    def __init__(self, folder: Path, made_from: Any = None):
        self._folder, self._made_from = folder, made_from
        self._matrices: list[MatrixFiles] = []

    def collect(
        self,
        name: str,
        trunk: Llama,
        rows: Sequence[Conversation],
        *,
        max_tokens: int,
        seed: int,
        standardised: bool = True,
        reuse: bool = True,
    ) -> Activations:
        """Runs the trunk, on its mesh, and keeps the states of tokens of the assistant turns.

        Every pooled token is kept. The other tokens are sampled without replacement, up to
        `max_tokens` tokens in all; if there are more conversations than that, only the pooled
        tokens are kept. If an earlier call has collected the same states, they are used again.

        Args:
            name: the name of the collection.
            trunk: the trunk.
            rows: the conversations.
            max_tokens: the largest number of tokens.
            seed: the seed of the sample.
            standardised: False: the states are kept as they are.
            reuse: False: they are always collected, and never used again.

        Raises:
            InputError: a state is not finite.
            OSError: the disk is full.
        """
        kept = _sample_tokens(
            [row.turn_length for row in rows], max_tokens, np.random.default_rng(seed)
        )
        offsets = np.concatenate([[0], np.cumsum([len(k) for k in kept])])
        pooled_n = np.zeros(offsets[-1], bool)
        pooled_n[offsets[1:] - 1] = True
        shape = (len(pooled_n), trunk.config.hidden_size)
        made_from = self._made_from if reuse else None
        matrix = self._reusable(name, shape, made_from)
        if matrix is None:
            states = _kept_states(trunk, rows, kept, standardised)
            _write(
                self._folder / name,
                shape,
                ((int(offsets[i]), x_kd) for i, x_kd in states),
                made_from=made_from,
                tensor=_tensor(standardised),
            )
            matrix = open_matrix(self._folder / name, shape, made_from)
            assert matrix is not None
        self._matrices.append(matrix)
        return Activations(matrix, pooled_n)

    def _reusable(self, name: str, shape: tuple[int, int], made_from: Any) -> MatrixFiles | None:
        """Opens the states that an earlier call has collected, if all processes have theirs."""
        if made_from is None:
            return None
        matrix = None
        try:
            matrix = open_matrix(self._folder / name, shape, made_from)
        except InputError as error:
            LOG.warning("%s; the activations are collected again", error)
        if processes.all_max(matrix is None):
            if matrix is not None:
                matrix.close()
            return None
        LOG.info("using the %d activations in %s again", shape[0], self._folder / name)
        return matrix

    def remove(self) -> None:
        """Removes all collections, and the folder if nothing else is in it.

        What cannot be removed is named in the log: no training that has ended is lost for it.
        """
        while self._matrices:
            self._matrices.pop().close()
        for path in filter(Path.is_dir, self._folder.glob("*")):
            try:
                remove_matrix(path)
            except OSError as error:
                LOG.warning("activations stay in %s: %s", path, first_line(error))
        with contextlib.suppress(OSError):
            self._folder.rmdir()


def _write(
    folder: Path,
    shape: tuple[int, int],
    states: Iterator[tuple[int, np.ndarray]],
    *,
    made_from: Any,
    tensor: str,
) -> None:
    """Writes states (number of the first row, rows) as they come, and checks them.

    A process that cannot write goes on computing with the others, since they communicate.

    Args:
        folder: the folder of the matrix.
        shape: N and D.
        states: the states, together all rows.
        made_from: what they are made from.
        tensor: what messages call them.

    Raises:
        InputError: a state is not finite.
        OSError: the disk is full.
    """
    check, problem = FiniteCheck(), None
    with contextlib.ExitStack() as stack:
        with processes.raising_on_all():
            matrix = stack.enter_context(writing_matrix(folder, shape, made_from))
        for row, x_kd in states:
            check.add(x_kd)
            try:
                if problem is None:
                    matrix.write(row, x_kd)
            except OSError as error:
                if not processes.connected():
                    raise
                problem = error
        check.require("the model", tensor)
        with processes.raising_on_all():
            if problem is not None:
                raise problem
            stack.close()


@contextlib.contextmanager
def temporary_folder() -> Iterator[ActivationFolder]:
    """Yields a folder for activations that nobody uses again; it is removed at the end."""
    with tempfile.TemporaryDirectory(prefix="sarm_jax_") as path:
        folder = ActivationFolder(Path(path) / "activations")
        try:
            yield folder
        finally:
            folder.remove()


def collect_pooled(
    trunk: Llama, rows: Sequence[Conversation], standardised: bool = True
) -> np.ndarray:
    """Runs the trunk, on its mesh, and returns the pooled states of conversations `[R, D]`.

    They stay in memory. With `standardised` False they are returned as they are.

    Raises:
        InputError: a state is not finite.
    """
    x_rd = np.empty((len(rows), trunk.config.hidden_size), np.float32)
    check, kept = FiniteCheck(), [np.zeros(1, int)] * len(rows)
    for i, x_kd in _kept_states(trunk, rows, kept, standardised):
        check.add(x_kd)
        x_rd[i] = x_kd[0]
    check.require("the model", _tensor(standardised))
    return x_rd


def _tensor(standardised: bool) -> str:
    """Returns what messages call the states."""
    return "the states of the first layers" if standardised else "the states of its layers"


def _kept_states(
    trunk: Llama, rows: Sequence[Conversation], kept: Sequence[np.ndarray], standardised: bool
) -> Iterator[tuple[int, np.ndarray]]:
    """Yields (number of the conversation, states `[K, D]` of its kept tokens), in any order."""
    graphdef, state = nnx.split(trunk)
    placement = trunk.placement
    states = _standardised if standardised else _states
    length_r = np.asarray([scored_length(len(row.ids)) for row in rows])
    batch_sizes = {int(n): batch_rows(int(n), placement) for n in np.unique(length_r)}
    examples = [
        placement.rows(pad_batch([[0]] * size, length, 0)) for length, size in batch_sizes.items()
    ]
    compile_programs(
        partial(states.lower, graphdef, state, tokens_bt, mask_bt)
        for tokens_bt, mask_bt in examples
    )
    with tqdm(total=len(rows), desc="activations", unit="row") as bar:
        for length, size in batch_sizes.items():
            indices = np.flatnonzero(length_r == length)
            for start in range(0, len(indices), size):
                batch = indices[start : start + size]
                ids = [rows[i].ids for i in batch]
                ids += [ids[0]] * (size - len(ids))
                tokens_bt, mask_bt = placement.rows(pad_batch(ids, length, 0))
                x_btd = np.asarray(processes.fetch(states(graphdef, state, tokens_bt, mask_bt)))
                for x_td, i in zip(x_btd, batch, strict=False):
                    yield int(i), x_td[len(rows[i].ids) - 1 - kept[i]]
                bar.update(len(batch))


def batch_rows(length: int, placement: Placement) -> int:
    """Returns how many conversations of a length run together, a number that the mesh divides."""
    return max(-(-(TOKENS_PER_BATCH // length) // placement.parts), 1) * placement.parts


def lower_states(trunk: Llama, length: int) -> Lowered:
    """Lowers the program that collects standardised states, from shapes alone.

    Args:
        trunk: the trunk, of descriptions of arrays, with its placement.
        length: tokens of a padded conversation.
    """
    placement, (graphdef, state) = trunk.placement, nnx.split(trunk)
    shape = batch_rows(length, placement), length
    tokens_bt, mask_bt = (placement.abstract_rows(shape, kind) for kind in (jnp.int32, bool))
    return _standardised.lower(graphdef, placement.abstract_parameters(state), tokens_bt, mask_bt)


@partial(jax.jit, static_argnums=0)
def _standardised(graphdef, state, tokens_bt, mask_bt):
    """Computes the standardised trunk states `[B, T, D]` of a padded batch."""
    return standardise(nnx.merge(graphdef, state).hidden(tokens_bt, mask_bt))


@partial(jax.jit, static_argnums=0)
def _states(graphdef, state, tokens_bt, mask_bt):
    """Computes the trunk states `[B, T, D]` of a padded batch in float32."""
    return nnx.merge(graphdef, state).hidden(tokens_bt, mask_bt).astype(jnp.float32)


def _sample_tokens(turn_lengths, max_tokens, rng):
    """Samples the tokens to keep of each turn.

    Returns:
        For each turn the kept tokens in reading order, counted from the end: 0 is the pooled one.
    """
    others_r = np.asarray(turn_lengths) - 1
    end_r = np.cumsum(others_r)
    total, room = int(end_r[-1]), max(max_tokens - len(turn_lengths), 0)
    sample = np.arange(total)
    if total > room:
        sample = np.sort(rng.choice(total, room, replace=False))
    row = np.searchsorted(end_r, sample, side="right")
    back = sample - (end_r - others_r)[row] + 1
    per_row = np.split(back, np.searchsorted(row, np.arange(1, len(turn_lengths))))
    return [np.concatenate([k[::-1], [0]]) for k in per_row]
