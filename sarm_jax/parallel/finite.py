"""The check that numbers are finite, of weights that are read, trained or written.

Host arrays are checked on the host. An array on a device is reduced there to a single flag, at the
speed at which the device reads its memory, and the host waits once for the flags of all arrays.
"""

from collections.abc import Iterable, Mapping
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from sarm_jax.io.errors import InputError
from sarm_jax.parallel.processes import fetch

PIECE = 1 << 18  # numbers that are checked at a time, so that they stay in the cache
# NumPy has no fast `isfinite` of these: in NaN and infinity all bits of the exponent are set.
EXPONENT = {"bfloat16": 0x7F80, "float16": 0x7C00}


class NotFiniteError(InputError):
    """Numbers that have to be finite are not."""


def first_not_finite(arrays: Iterable[tuple[str, Any]]) -> str | None:
    """Returns the name of the first array that holds NaN or infinity; None if there is none.

    Args:
        arrays: (name, array) pairs. All processes have to pass the same ones.
    """
    flags = [(name, is_finite(array)) for name, array in arrays]
    finite = fetch([flag for _, flag in flags])
    return next((name for (name, _), flag in zip(flags, finite, strict=True) if not flag), None)


def is_finite(array: Any) -> jax.Array | bool:
    """Returns True if all numbers are finite; of an array on a device, as a flag on that device."""
    if isinstance(array, jax.Array):
        return _on_device(array)
    flat = np.asarray(array).reshape(-1)
    return all(_piece_is_finite(flat[i : i + PIECE]) for i in range(0, flat.size, PIECE))


def require_finite(arrays: Mapping[str, np.ndarray], source: object) -> None:
    """Raises NotFiniteError, naming `source` and the tensor, if a host array is not finite."""
    for name, array in arrays.items():
        check = FiniteCheck()
        check.add(array)
        check.require(source, name)


def describe(array: np.ndarray) -> str:
    """Describes what is not finite in an array."""
    check = FiniteCheck()
    check.add(array)
    return check.describe()


class FiniteCheck:
    """Counts the numbers of an array that are not finite, of which it gets a part at a time."""

    def __init__(self) -> None:
        self._size, self._bad, self._nan = 0, 0, False

    def add(self, part: np.ndarray) -> None:
        """Counts the numbers of a host array."""
        part = np.asarray(part)
        self._size += part.size
        if not is_finite(part):
            values = part.astype(np.float64)
            bad = values[~np.isfinite(values)]
            self._bad, self._nan = self._bad + bad.size, self._nan or bool(np.isnan(bad).any())

    def describe(self) -> str:
        """Describes what is not finite."""
        found = "NaN" if self._nan else "infinity"
        return f"holds {found} ({self._bad} of {self._size} numbers are not finite)"

    def require(self, source: object, name: str) -> None:
        """Raises NotFiniteError, naming `source` and the tensor, if a number was not finite."""
        if self._bad:
            raise NotFiniteError(f"{source}: {name}: {self.describe()}, expected finite numbers")


@jax.jit
def _on_device(array: jax.Array) -> jax.Array:
    return jnp.isfinite(array).all()


def _piece_is_finite(piece: np.ndarray) -> bool:
    exponent = EXPONENT.get(piece.dtype.name)
    if exponent is None:
        return bool(np.isfinite(piece).all())
    return bool(((piece.view(np.uint16) & exponent) < exponent).all())
