"""Checks of what models are called with, the same for callers from Python and for the stages.

JAX does not raise for an index out of range, and a model computes something at positions that it
was never trained on, so that wrong input would give plausible numbers.
"""

from collections.abc import Sequence
from numbers import Integral
from typing import Any, NamedTuple

import jax
import numpy as np

from sarm_jax.io.errors import InputError
from sarm_jax.parallel.processes import fetch


class Positions(NamedTuple):
    """The most tokens of a sequence of a model, and the field of config.json that says so."""

    tokens: int
    field: str


def check_positions(
    tokens: int,
    new_tokens: int,
    positions: Positions,
    *,
    option: str = "max_new_tokens",
    model: str = "the model",
) -> None:
    """Raises InputError if a sequence can exceed the positions of a model.

    Args:
        tokens: number of tokens of the longest prompt or sequence.
        new_tokens: the most tokens that are added to it.
        positions: the most tokens of a sequence of the model.
        option: the option that gives `new_tokens`, for the message.
        model: the model, for the message.
    """
    most, field = positions
    limit = f"{most} positions ({field}) of {model}"
    if not new_tokens and tokens > most:
        raise InputError(f"{tokens} tokens exceed the {limit}")
    if tokens + new_tokens > most:
        raise InputError(
            f"{option}={new_tokens}: with the {tokens} tokens of the longest prompt this exceeds "
            f"the {limit}"
        )


def check_arrays(tokens_bt: Any, mask_bt: Any) -> None:
    """Raises InputError unless tokens and mask have the same shape `[B, T]` and fitting dtypes."""
    for name, array in (("tokens", tokens_bt), ("mask", mask_bt)):
        if np.ndim(array) != 2 or not hasattr(array, "dtype"):
            found = f"shape {np.shape(array)}" if hasattr(array, "dtype") else type(array).__name__
            raise InputError(f"{name}: expected an array [batch, length], found {found}")
    if tokens_bt.shape != mask_bt.shape:
        raise InputError(f"mask has shape {mask_bt.shape}, tokens have shape {tokens_bt.shape}")
    if not np.issubdtype(tokens_bt.dtype, np.integer):
        raise InputError(f"tokens: expected integers, found {tokens_bt.dtype}")
    if not (mask_bt.dtype == bool or np.issubdtype(mask_bt.dtype, np.number)):
        raise InputError(f"mask: expected truth values, found {mask_bt.dtype}")


def check_batch(
    tokens_bt: Any, mask_bt: Any, *, vocab_size: int, positions: Positions, new_tokens: int = 0
) -> np.ndarray | None:
    """Checks the arguments of a model; inside a program only their shapes and dtypes.

    Args:
        tokens_bt: token ids. Those of padding may be anything.
        mask_bt: marks the real tokens.
        vocab_size: number of tokens of the model.
        positions: the most tokens of a sequence of the model.
        new_tokens: the most tokens that are added to a row.

    Returns:
        The number of real tokens of each row `[B]`; None inside a program.

    Raises:
        InputError: a shape, a dtype, a token id or a length is wrong.
    """
    check_arrays(tokens_bt, mask_bt)
    if isinstance(tokens_bt, jax.core.Tracer) or isinstance(mask_bt, jax.core.Tracer):
        return None
    tokens_bt, mask_bt = (np.asarray(array) for array in fetch((tokens_bt, mask_bt)))
    if not np.isin(mask_bt, (0, 1)).all():
        raise InputError("mask: expected 0 for padding and 1 for tokens, found other values")
    length_b = mask_bt.astype(bool).sum(axis=1)
    _check_ids(tokens_bt[mask_bt.astype(bool)], vocab_size)
    check_positions(int(length_b.max(initial=0)), new_tokens, positions)
    return length_b


def check_no_row_is_empty(length_b: np.ndarray | None) -> None:
    """Raises InputError if a row has no real token, of lengths that `check_batch` returned."""
    if length_b is not None and not length_b.all():
        raise InputError(f"row {int(np.argmin(length_b))} of the mask has no token")


def check_rows(rows: Sequence[Sequence[int]], *, vocab_size: int, most: int) -> None:
    """Raises InputError unless rows of token ids have 1 to `most` tokens of the vocabulary."""
    for number, row in enumerate(rows):
        ids = np.asarray(row)
        if ids.ndim != 1 or not len(ids):
            raise InputError(f"row {number}: expected token ids, found shape {ids.shape}")
        if not np.issubdtype(ids.dtype, np.integer):
            raise InputError(f"row {number}: expected integers, found {ids.dtype}")
        _check_ids(ids, vocab_size)
        if len(ids) > most:
            raise InputError(f"row {number} has {len(ids)} tokens, at most {most} are scored")


def check_token_ids(name: str, ids: Sequence[int], vocab_size: int) -> None:
    """Raises InputError, naming the argument, unless all ids are those of tokens."""
    for i in ids:
        if not is_index(i, vocab_size):
            raise InputError(f"{name}={i!r}: expected ids of tokens, below {vocab_size}")


def check_features(name: str, ids: Any, latent_size: int) -> np.ndarray:
    """Returns feature ids as an array; raises InputError unless the SARM has all of them."""
    array = np.asarray(fetch(ids) if isinstance(ids, jax.Array) else ids)
    if not array.size:
        array = array.astype(np.int32)
    if array.ndim != 1 or not np.issubdtype(array.dtype, np.integer):
        found = f"shape {array.shape} of {array.dtype}"
        raise InputError(f"{name}: expected a list of feature ids, found {found}")
    wrong = array[(array < 0) | (array >= latent_size)]
    if len(wrong):
        raise InputError(
            f"{name}: feature {wrong[0]} does not exist: the SAE has {latent_size} latents"
        )
    return array.astype(np.int32)


def is_index(value: Any, size: int) -> bool:
    """Returns True for a whole number from 0 to `size` − 1, which a bool is not."""
    return isinstance(value, Integral) and not isinstance(value, bool) and 0 <= int(value) < size


def _check_ids(ids: np.ndarray, vocab_size: int) -> None:
    wrong = ids[(ids < 0) | (ids >= vocab_size)]
    if len(wrong):
        raise InputError(f"tokens: id {wrong[0]} is not one of the {vocab_size} tokens")
