"""The range of float32, in which models compute and options must lie."""

import numpy as np

LARGEST = float(np.finfo(np.float32).max)
SMALLEST = float(np.finfo(np.float32).smallest_normal)  # XLA takes smaller numbers for 0
RANGE = f"0 or between {SMALLEST:.2g} and {LARGEST:.2g} in size, as float32 has it"


def fits_float32(value: float) -> bool:
    """Returns True if float32 has the number: it is finite there and 0 only if it is 0."""
    return value == 0 or SMALLEST <= abs(value) <= LARGEST
