"""Means with intervals, and win rates."""

from collections.abc import Sequence
from typing import TypedDict

import numpy as np
from numpy.typing import ArrayLike
from scipy import stats

from sarm_jax.reporting.spread import is_constant


class Interval(TypedDict):
    """A mean with an interval; `low` and `high` are None if the spread cannot be estimated."""

    mean: float
    low: float | None
    high: float | None


def mean_interval(values: ArrayLike | Sequence[float], confidence: float = 0.95) -> Interval:
    """Computes the mean of independent values with Student's t interval."""
    x = np.asarray(values, np.float64)
    mean = float(x.mean())
    if len(x) < 2:
        return {"mean": mean, "low": None, "high": None}
    half = float(stats.t.ppf((1 + confidence) / 2, len(x) - 1) * x.std(ddof=1) / np.sqrt(len(x)))
    return {"mean": mean, "low": mean - half, "high": mean + half}


def stratified_interval(
    groups: Sequence[ArrayLike], weights: Sequence[float], confidence: float = 0.95
) -> Interval:
    """Computes the weighted mean of the means of independent groups, with an interval.

    The interval is Student's, with the degrees of freedom of Welch and Satterthwaite. For a single
    group it equals `mean_interval`.

    Args:
        groups: values of each group.
        weights: weight of each group; they sum to 1.
        confidence: coverage of the interval.

    Returns:
        The mean with its interval, which has no ends if a group has only one value.
    """
    values = [np.asarray(group, np.float64) for group in groups]
    mean = float(sum(w * x.mean() for w, x in zip(weights, values, strict=True)))
    if any(len(x) < 2 for x in values):
        return {"mean": mean, "low": None, "high": None}
    parts = [w * w * x.var(ddof=1) / len(x) for w, x in zip(weights, values, strict=True)]
    variance = sum(parts)
    if all(map(is_constant, values)):
        return {"mean": mean, "low": mean, "high": mean}
    freedom = variance**2 / sum(p * p / (len(x) - 1) for p, x in zip(parts, values, strict=True))
    half = float(stats.t.ppf((1 + confidence) / 2, freedom) * np.sqrt(variance))
    return {"mean": mean, "low": mean - half, "high": mean + half}


def wilson_interval(share: float, n: int) -> tuple[float, float]:
    """Computes the 95 % Wilson score interval of a share of `n` independent trials.

    Pairs that share a prompt are not independent: count prompts instead, which can only widen the
    interval.
    """
    z = 1.959964
    centre = (share + z * z / (2 * n)) / (1 + z * z / n)
    half = z / (1 + z * z / n) * np.sqrt(share * (1 - share) / n + z * z / (4 * n * n))
    return float(centre - half), float(centre + half)


def holm(p_values: Sequence[float]) -> list[float]:
    """Adjusts p values by Holm (1979) and returns them in the same order."""
    order = np.argsort(p_values, kind="stable")
    factors = len(p_values) - np.arange(len(p_values))
    stepped = np.minimum(1, np.maximum.accumulate(factors * np.asarray(p_values)[order]))
    adjusted = np.empty(len(p_values))
    adjusted[order] = stepped
    return adjusted.tolist()


def count_wins(margins: ArrayLike) -> np.ndarray:
    """Counts each positive margin as a win (1), each margin of 0 as half a win (1/2)."""
    return (np.sign(margins) + 1) / 2


def format_interval(interval: Interval, number_format: str = ".2f") -> str:
    """Formats an interval as "0.93 (95 % 0.90 to 0.96)", or as its mean if it has no ends.

    Args:
        interval: a 95 % interval.
        number_format: format specification of the three numbers, such as ".2f" or "+.4f".
    """
    mean = format(interval["mean"], number_format)
    if interval["low"] is None or interval["high"] is None:
        return mean
    low, high = (format(interval[end], number_format) for end in ("low", "high"))
    return f"{mean} (95 % {low} to {high})"
