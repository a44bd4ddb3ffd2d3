"""Stops a training that has diverged, before its result replaces anything.

A loss that is not finite never recovers, so training stops at once. A training can also diverge to
finite numbers: its last loss is then far above that of a model that predicts nothing.
"""

import math
from collections.abc import Mapping
from typing import Any

from flax import nnx

from sarm_jax.io.errors import TrainingStoppedError
from sarm_jax.parallel.finite import first_not_finite


class DivergedError(TrainingStoppedError):
    """Training diverged. Nothing of it was written."""


def check_loss(loss: float, name: str, option: str, limit: float = math.inf) -> None:
    """Raises DivergedError if a loss is not finite, or above a limit.

    Args:
        loss: the loss.
        name: what has this loss, for the message.
        option: the option that is likely to be too large.
        limit: the largest loss of a training that has not diverged.
    """
    if not math.isfinite(loss):
        raise DivergedError(f"{name} became {loss}: training diverged; lower {option}")
    if loss > limit:
        raise DivergedError(
            f"{name} is {loss:.3g} at the end, more than {limit:.3g}: training diverged; lower "
            f"{option}"
        )


def check_weights(module: nnx.Module, option: str) -> None:
    """Raises DivergedError, naming the parameter, if a trained module is not finite."""
    flat = nnx.to_flat_state(nnx.state(module))
    name = first_not_finite((".".join(map(str, path)), value[...]) for path, value in flat)
    if name is not None:
        raise DivergedError(f"{name} is not finite after training, which diverged; lower {option}")


def check_summary(summary: Mapping[str, Any], option: str, prefix: str = "") -> None:
    """Raises DivergedError, naming the entry, if a number of a summary is not finite."""
    for key, value in summary.items():
        name = f"{prefix}{key}"
        if isinstance(value, Mapping):
            check_summary(value, option, f"{name}.")
        elif isinstance(value, float) and not math.isfinite(value):
            raise DivergedError(f"{name} is {value}: training diverged; lower {option}")
