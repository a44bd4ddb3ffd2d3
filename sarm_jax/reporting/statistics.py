"""Means with intervals."""

from collections.abc import Sequence
from typing import TypedDict

import numpy as np
from numpy.typing import ArrayLike
from scipy import stats


class Interval(TypedDict):
    """A mean and its interval; `low` and `high` are None where one value says nothing of spread."""

    mean: float
    low: float | None
    high: float | None


def mean_interval(values: ArrayLike | Sequence[float], confidence: float = 0.95) -> Interval:
    """Student's t interval of the mean of independent values."""
    x = np.asarray(values, np.float64)
    mean = float(x.mean())
    if len(x) < 2:
        return {"mean": mean, "low": None, "high": None}
    half = float(stats.t.ppf((1 + confidence) / 2, len(x) - 1) * x.std(ddof=1) / np.sqrt(len(x)))
    return {"mean": mean, "low": mean - half, "high": mean + half}


def stratified_interval(
    groups: Sequence[ArrayLike], weights: Sequence[float], confidence: float = 0.95
) -> Interval:
    """The weighted mean of the means of independent groups; `weights` sum to 1.

    The interval is Student's, with the degrees of freedom of Welch and Satterthwaite; for one
    group it is `mean_interval`. Without spread in a group of one value there is none.
    """
    values = [np.asarray(group, np.float64) for group in groups]
    mean = float(sum(w * x.mean() for w, x in zip(weights, values, strict=True)))
    if any(len(x) < 2 for x in values):
        return {"mean": mean, "low": None, "high": None}
    parts = [w * w * x.var(ddof=1) / len(x) for w, x in zip(weights, values, strict=True)]
    variance = sum(parts)
    if variance == 0:
        return {"mean": mean, "low": mean, "high": mean}
    freedom = variance**2 / sum(p * p / (len(x) - 1) for p, x in zip(parts, values, strict=True))
    half = float(stats.t.ppf((1 + confidence) / 2, freedom) * np.sqrt(variance))
    return {"mean": mean, "low": mean - half, "high": mean + half}


def wilson_interval(share: float, n: int) -> tuple[float, float]:
    """The 95 % Wilson score interval of a share of `n` independent trials.

    Pairs of one prompt are not independent: count prompts, which errs on the wide side.
    """
    z = 1.959964
    centre = (share + z * z / (2 * n)) / (1 + z * z / n)
    half = z / (1 + z * z / n) * np.sqrt(share * (1 - share) / n + z * z / (4 * n * n))
    return float(centre - half), float(centre + half)
