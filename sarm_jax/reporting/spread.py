"""Decides whether values vary, before anything is divided by how much they vary.

The float32 standard deviation of equal values is 0 for few numbers of values only: their rounded
mean differs from them, so that it is about 1e-8 of their size. Divided by it, rounding errors look
like a signal. Spread is therefore measured in float64 and compared with the size of the values.
"""

import numpy as np
from numpy.typing import ArrayLike

# Range of values that differ by rounding alone, relative to the largest one: a few units in the
# last place of float32, which programs of other shapes give equal inputs.
ROUNDING = 4 * float(np.finfo(np.float32).eps)
INACCURATE = 1e-4  # relative error of a float32 standard deviation that is replaced


def is_constant(values: ArrayLike, axis: int | None = None) -> np.ndarray:
    """Returns True if finite values are equal up to rounding; along `axis`, or all together."""
    x = np.asarray(values)
    high, low = (np.asarray(end(axis=axis), np.float64) for end in (x.max, x.min))
    with np.errstate(invalid="ignore"):
        return high - low <= ROUNDING * np.maximum(np.abs(high), np.abs(low))


def standard_deviation(values: ArrayLike) -> float:
    """Computes the standard deviation; exactly 0 if the values are equal up to rounding.

    The result has the rounding of the values' own dtype, unless that is inaccurate, as it is for
    float32 values that are large beside their spread, or whose squares overflow or vanish.
    """
    x = np.asarray(values)
    if is_constant(x):
        return 0.0
    with np.errstate(over="ignore"):
        own, accurate = float(np.std(x)), float(np.std(x, dtype=np.float64))
    return own if abs(own - accurate) <= INACCURATE * accurate else accurate
