"""Is a latent higher on chosen than on rejected responses? Mood's median test within prompts.

A prompt's responses that lie above their common median are called high; it needs no shape of the
latents, which are 0 nearly everywhere. Under the null the labels of a prompt's n responses are
exchangeable: of c chosen ones with k high responses, a hypergeometric number with mean c k / n is
high. The sum T over prompts is one of independent Bernoulli variables, N = Σ c of them, and its
tails are at most those of a binomial with N trials and the same mean μ (Hoeffding 1956, theorem 4):
    p = min(1, 2 P[Bin(N, μ / N) as far from μ as T, on its side]),   1 where |T − μ| < 1
A prompt with one pair gives what it gives to the exact sign test. One whose responses are all the
same, and a response that is chosen in one pair and rejected in another, say nothing. Counting the
pairs of an answer that is in several of them as trials of their own would be far too bold: of six
rejected responses to one chosen, one is above it nearly always.
"""

import dataclasses

import numpy as np
from scipy import stats


@dataclasses.dataclass(frozen=True)
class MedianTest:
    """Groups of prompts with n responses each: their rows in the latents `[Q, n]`, and whether
    they are chosen `[Q, n]`."""

    groups: tuple[tuple[np.ndarray, np.ndarray], ...]

    @classmethod
    def of(cls, prompt_p: np.ndarray, chosen_p: np.ndarray, rejected_p: np.ndarray) -> "MedianTest":
        """Of pairs of rows; `prompt_p` numbers their prompts."""
        sides = [np.unique(np.stack([prompt_p, x], axis=1), axis=0) for x in (chosen_p, rejected_p)]
        both, place, count = np.unique(
            np.concatenate(sides), axis=0, return_index=True, return_counts=True
        )
        (prompt_u, row_u), is_chosen_u = both[count == 1].T, place[count == 1] < len(sides[0])
        _, start, size = np.unique(prompt_u, return_index=True, return_counts=True)
        groups = []
        for n in np.unique(size):
            unit_qn = start[size == n][:, None] + np.arange(n)
            chosen_qn = is_chosen_u[unit_qn]
            mixed = chosen_qn.any(axis=1) & ~chosen_qn.all(axis=1)
            groups.append((row_u[unit_qn[mixed]], chosen_qn[mixed]))
        return cls(tuple(groups))

    def __call__(self, z_nb: np.ndarray) -> np.ndarray:
        """p `[b]` of the latents' columns `[N, b]`; NaN where no prompt says anything."""
        width = z_nb.shape[1]
        high_b, trials_b, mean_b = np.zeros((3, width))
        for row_qn, chosen_qn in self.groups:
            size = row_qn.shape[1]
            prompt_a, column_a = np.nonzero(np.any([z_nb[row_q] != 0 for row_q in row_qn.T], 0))
            z_an = z_nb[row_qn[prompt_a], column_a[:, None]]
            high_an = z_an > np.median(z_an, axis=1, keepdims=True)
            share_a = high_an.sum(axis=1) / size
            chosen_a = chosen_qn[prompt_a].sum(axis=1)
            for total_b, values_a in (
                (high_b, (high_an & chosen_qn[prompt_a]).sum(axis=1)),
                (trials_b, np.where(share_a > 0, chosen_a, 0)),
                (mean_b, chosen_a * share_a),
            ):
                total_b += np.bincount(column_a, values_a, width)
        return _p_values(high_b, trials_b, mean_b)


def _p_values(high_b: np.ndarray, trials_b: np.ndarray, mean_b: np.ndarray) -> np.ndarray:
    rate_b = mean_b / np.maximum(trials_b, 1)
    below_b = stats.binom.cdf(high_b, trials_b, rate_b)
    above_b = stats.binom.sf(high_b - 1, trials_b, rate_b)
    tail_b = np.where(high_b < mean_b, below_b, above_b)
    near_b = np.abs(high_b - mean_b) < 1 - 1e-9
    p_b = np.where(near_b, 1, np.minimum(1, 2 * tail_b))
    return np.where(trials_b > 0, p_b, np.nan)
