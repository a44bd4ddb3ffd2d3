"""Comparisons of floats at the scale of the compared quantity."""

from collections.abc import Iterable

import numpy as np
from numpy.typing import ArrayLike

RUN_TOLERANCE = 2e-5  # later steps amplify the rounding of earlier ones
LOGP = 3.0  # lower bound of |log-probability| of the tiny policies, in nats


def assert_close(
    actual: ArrayLike,
    expected: ArrayLike,
    relative: float = 1e-5,
    terms: ArrayLike = 0.0,
    name: str = "",
) -> None:
    """Asserts that `actual` differs from `expected` by at most `relative` of its scale.

    The scale is the largest magnitude in `expected` and `terms`; a scale of 0 requires equality.

    Args:
        actual: the values under test.
        expected: the right values. Every entry of a product of matrices has the rounding error of
            its terms, however small the entry is, so that the largest entry sets the scale.
        relative: the tolerance relative to the scale.
        terms: the operands, if `expected` is a difference that nearly cancels; it then has their
            rounding error.
        name: a name for the message.
    """
    actual, expected, terms = (np.asarray(x, np.float64) for x in (actual, expected, terms))
    assert np.isfinite(expected).all() and np.isfinite(terms).all(), f"{name}: not finite"
    scale = max(np.abs(x).max(initial=0.0) for x in (expected, terms))
    np.testing.assert_allclose(actual, expected, rtol=0, atol=relative * scale, err_msg=name)


def metric_terms(name: str, values_n: np.ndarray) -> np.ndarray:
    """Returns the magnitude of the operands in the column `name`, for `terms` of `assert_close`.

    Scores and whitened advantages have both signs and a magnitude of about 1, so that their mean
    may be near 0. A KL is about half the square of a log-ratio: its rounding error is that of the
    log-probabilities times the size of their difference.
    """
    if name in ("total_reward", "rm_score", "policy_loss", "ppo_loss"):
        return np.ones_like(values_n)
    if name in ("ref_kl", "approx_kl"):
        return LOGP * np.sqrt(2 * np.abs(values_n))
    return values_n


def assert_same_metrics(rows: list[dict], expected: list[dict], names: Iterable[str]) -> None:
    """Asserts that the named columns of metrics.csv are equal, each at the scale of its values."""
    for name in names:
        actual_n, expected_n = (
            np.array([row[name] for row in table]) for table in (rows, expected)
        )
        assert_close(actual_n, expected_n, RUN_TOLERANCE, metric_terms(name, expected_n), name)
