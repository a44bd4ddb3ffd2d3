"""Mood's median test within prompts: is a latent higher on chosen than on rejected responses?

A response counts as high if it lies above the median of all responses to its prompt. The test
assumes no distribution of the latents, which are 0 nearly everywhere. Under the null hypothesis the
labels of a prompt's n responses are exchangeable: if c of them are chosen and k are high, the
number of high chosen responses is hypergeometric with mean c k / n. The sum T over prompts is a sum
of N = Σ c independent Bernoulli variables. Its tails are at most those of a binomial distribution
with N trials and the same mean μ (Hoeffding 1956, theorem 4):
    p = min(1, 2 P[Bin(N, μ / N) as far from μ as T, on its side]),   1 if |T − μ| < 1
A prompt with a single pair contributes what it contributes to the exact sign test. A prompt whose
responses are all the same contributes nothing, nor does a response that is chosen in one pair and
rejected in another. Pairs that share a response are not independent trials: with six rejected
responses to one chosen response, nearly always one of the six lies above it.
"""

import dataclasses

import numpy as np
from scipy import stats


@dataclasses.dataclass(frozen=True)
class MedianTest:
    """The test for a fixed set of pairs; call it with columns of latents.

    Attributes:
        groups: for each number n of responses to a prompt, the row numbers `[Q, n]` of the latents
            and whether each row is chosen `[Q, n]`.
    """

    groups: tuple[tuple[np.ndarray, np.ndarray], ...]

    @classmethod
    def from_pairs(
        cls, prompt_p: np.ndarray, chosen_p: np.ndarray, rejected_p: np.ndarray
    ) -> "MedianTest":
        """Groups the responses of pairs by prompt.

        Args:
            prompt_p: number of the prompt of each pair.
            chosen_p: row number of the chosen response of each pair.
            rejected_p: row number of the rejected response of each pair.
        """
        sides = [np.unique(np.stack([prompt_p, x], axis=1), axis=0) for x in (chosen_p, rejected_p)]
        both, index, count = np.unique(
            np.concatenate(sides), axis=0, return_index=True, return_counts=True
        )
        (prompt_u, row_u), is_chosen_u = both[count == 1].T, index[count == 1] < len(sides[0])
        _, start, size = np.unique(prompt_u, return_index=True, return_counts=True)
        groups = []
        for n in np.unique(size):
            unit_qn = start[size == n][:, None] + np.arange(n)
            chosen_qn = is_chosen_u[unit_qn]
            mixed = chosen_qn.any(axis=1) & ~chosen_qn.all(axis=1)
            groups.append((row_u[unit_qn[mixed]], chosen_qn[mixed]))
        return cls(tuple(groups))

    def __call__(self, z_nb: np.ndarray) -> np.ndarray:
        """Returns the p values `[b]` of columns `[N, b]`; NaN if no prompt contributes anything."""
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
    """Computes two-sided binomial p values from T, N and μ of each column."""
    rate_b = mean_b / np.maximum(trials_b, 1)
    below_b = stats.binom.cdf(high_b, trials_b, rate_b)
    above_b = stats.binom.sf(high_b - 1, trials_b, rate_b)
    tail_b = np.where(high_b < mean_b, below_b, above_b)
    near_b = np.abs(high_b - mean_b) < 1 - 1e-9
    p_b = np.where(near_b, 1, np.minimum(1, 2 * tail_b))
    return np.where(trials_b > 0, p_b, np.nan)
