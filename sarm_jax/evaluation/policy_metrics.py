"""What is said of a policy's responses: repetition, wins, correlation, intervals, score terms.

Intervals are the 2.5 % and 97.5 % quantiles over bootstrap samples of prompts. The same samples
serve every run, so that a difference between two runs is paired.
"""

import numpy as np

from sarm_jax.statistics import Interval


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


def bootstrap_mean(value_n: np.ndarray, index_rn: np.ndarray) -> Interval:
    """The mean over prompts."""
    value_n = np.asarray(value_n, np.float64)
    return _interval(float(value_n.mean()), value_n[index_rn].mean(axis=1))


def correlations(x_rn: np.ndarray, y_rn: np.ndarray) -> np.ndarray:
    """Pearson's r of every row, NaN where a side is constant."""
    dx_rn = x_rn - x_rn.mean(axis=-1, keepdims=True)
    dy_rn = y_rn - y_rn.mean(axis=-1, keepdims=True)
    spread_r = np.sqrt((dx_rn**2).sum(-1) * (dy_rn**2).sum(-1))
    flat_r = (np.ptp(x_rn, axis=-1) == 0) | (np.ptp(y_rn, axis=-1) == 0)
    with np.errstate(invalid="ignore", divide="ignore"):
        return np.where(flat_r, np.nan, (dx_rn * dy_rn).sum(-1) / spread_r)


def score_terms(z_f: np.ndarray, w_f: np.ndarray, score: float, shown: int) -> tuple[list, float]:
    """([feature, z, w, z·w] of the largest |z·w|, rest): score = Σ shown z·w + rest, in float64."""
    z_f, w_f = z_f.astype(np.float64), w_f.astype(np.float64)
    term_f = z_f * w_f
    order = np.argsort(-np.abs(term_f), kind="stable")[:shown]
    terms = [
        [int(i), float(z_f[i]), float(w_f[i]), float(term_f[i])] for i in order if term_f[i] != 0
    ]
    return terms, float(score) - sum(term[3] for term in terms)


def _interval(point: float, found_r: np.ndarray) -> Interval:
    low, high = np.quantile(found_r, [0.025, 0.975])
    return {"mean": point, "low": float(low), "high": float(high)}


def correlation_interval(x_n: np.ndarray, y_n: np.ndarray, index_rn: np.ndarray) -> Interval | None:
    """Pearson's r over prompts; None where it is not defined."""
    x_n, y_n = np.asarray(x_n, np.float64), np.asarray(y_n, np.float64)
    point = float(correlations(x_n, y_n))
    found_r = correlations(x_n[index_rn], y_n[index_rn])
    found_r = found_r[np.isfinite(found_r)]
    return _interval(point, found_r) if np.isfinite(point) and len(found_r) else None
