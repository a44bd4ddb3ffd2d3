"""Metrics of responses to prompts: repetition, wins, means and correlations with intervals.

Intervals are the 2.5 % and 97.5 % quantiles over bootstrap samples of prompts; the responses to one
prompt stay together. All policies use the same bootstrap samples, so that differences are paired.
"""

import numpy as np

from sarm_jax.reporting.spread import is_constant
from sarm_jax.reporting.statistics import Interval


def repetition(text: str, n: int = 3) -> float:
    """Returns the share of a text's word n-grams that repeat an earlier one, 0 without n-grams."""
    words = text.split()
    ngrams = [tuple(words[i : i + n]) for i in range(len(words) - n + 1)]
    return 1 - len(set(ngrams)) / len(ngrams) if ngrams else 0.0


def wins(score_n: np.ndarray, base_n: np.ndarray) -> np.ndarray:
    """Returns 1 for a score above the base's, ½ for an equal one and 0 for a lower one."""
    return np.where(score_n == base_n, 0.5, (score_n > base_n).astype(np.float64))


def bootstrap_indices(prompts: int, resamples: int, seed: int) -> np.ndarray:
    """Returns indices of prompts drawn with replacement, `[resamples, prompts]`."""
    return np.random.default_rng(seed).integers(prompts, size=(resamples, prompts))


def bootstrap_mean(value_ps: np.ndarray, index_rp: np.ndarray) -> Interval:
    """Returns the mean of values `[prompts, samples]` with its interval."""
    value_p = value_ps.mean(axis=1)
    return interval(float(value_p.mean()), value_p[index_rp].mean(axis=1))


def bootstrap_correlation(
    x_ps: np.ndarray, y_ps: np.ndarray, index_rp: np.ndarray
) -> tuple[float, np.ndarray]:
    """Returns Pearson's r over all responses, and in every bootstrap sample `[R]`.

    A correlation that is undefined is NaN.
    """
    rows = len(index_rp)
    sample_r = correlations(x_ps[index_rp].reshape(rows, -1), y_ps[index_rp].reshape(rows, -1))
    return float(correlations(x_ps.ravel(), y_ps.ravel())), sample_r


def correlations(x_rn: np.ndarray, y_rn: np.ndarray) -> np.ndarray:
    """Returns Pearson's r of every row, NaN if x or y is constant in the row up to rounding."""
    dx_rn = x_rn - x_rn.mean(axis=-1, keepdims=True)
    dy_rn = y_rn - y_rn.mean(axis=-1, keepdims=True)
    spread_r = np.sqrt((dx_rn**2).sum(-1) * (dy_rn**2).sum(-1))
    constant_r = is_constant(x_rn, axis=-1) | is_constant(y_rn, axis=-1)
    with np.errstate(invalid="ignore", divide="ignore"):
        return np.where(constant_r, np.nan, (dx_rn * dy_rn).sum(-1) / spread_r)


def interval(point: float, sample_r: np.ndarray) -> Interval:
    """Returns a value with the quantiles of its bootstrap samples, ignoring undefined samples."""
    sample_r = sample_r[np.isfinite(sample_r)]
    if not len(sample_r):
        return {"mean": point, "low": None, "high": None}
    low, high = np.quantile(sample_r, [0.025, 0.975])
    return {"mean": point, "low": float(low), "high": float(high)}
