"""What is said of responses to prompts: repetition, wins, means and correlations with intervals.

Intervals are the 2.5 % and 97.5 % quantiles over bootstrap samples of prompts; the responses to one
prompt stay together. The same samples serve every policy, so that differences are paired.
"""

import numpy as np

from sarm_jax.reporting.statistics import Interval


def repetition(text: str, n: int = 3) -> float:
    """The share of word n-grams that occurred before in the text; 0 where there is none."""
    words = text.split()
    grams = [tuple(words[i : i + n]) for i in range(len(words) - n + 1)]
    return 1 - len(set(grams)) / len(grams) if grams else 0.0


def wins(score_n: np.ndarray, base_n: np.ndarray) -> np.ndarray:
    """1 where the score is higher than the base's, ½ where they are equal, else 0."""
    return np.where(score_n == base_n, 0.5, (score_n > base_n).astype(np.float64))


def bootstrap_indices(prompts: int, resamples: int, seed: int) -> np.ndarray:
    """Prompts drawn with replacement, `[resamples, prompts]`."""
    return np.random.default_rng(seed).integers(prompts, size=(resamples, prompts))


def bootstrap_mean(value_ps: np.ndarray, index_rp: np.ndarray) -> Interval:
    """The mean of values `[prompts, samples]`."""
    value_p = value_ps.mean(axis=1)
    return interval(float(value_p.mean()), value_p[index_rp].mean(axis=1))


def bootstrap_correlation(
    x_ps: np.ndarray, y_ps: np.ndarray, index_rp: np.ndarray
) -> tuple[float, np.ndarray]:
    """(Pearson's r over all responses, r in every bootstrap sample `[R]`); NaN: not defined."""
    rows = len(index_rp)
    found_r = correlations(x_ps[index_rp].reshape(rows, -1), y_ps[index_rp].reshape(rows, -1))
    return float(correlations(x_ps.ravel(), y_ps.ravel())), found_r


def correlations(x_rn: np.ndarray, y_rn: np.ndarray) -> np.ndarray:
    """Pearson's r of every row, NaN where a side is constant."""
    dx_rn = x_rn - x_rn.mean(axis=-1, keepdims=True)
    dy_rn = y_rn - y_rn.mean(axis=-1, keepdims=True)
    spread_r = np.sqrt((dx_rn**2).sum(-1) * (dy_rn**2).sum(-1))
    flat_r = (np.ptp(x_rn, axis=-1) == 0) | (np.ptp(y_rn, axis=-1) == 0)
    with np.errstate(invalid="ignore", divide="ignore"):
        return np.where(flat_r, np.nan, (dx_rn * dy_rn).sum(-1) / spread_r)


def interval(point: float, found_r: np.ndarray) -> Interval:
    """A value with the quantiles of its bootstrap samples; those not defined are left out."""
    found_r = found_r[np.isfinite(found_r)]
    if not len(found_r):
        return {"mean": point, "low": None, "high": None}
    low, high = np.quantile(found_r, [0.025, 0.975])
    return {"mean": point, "low": float(low), "high": float(high)}
