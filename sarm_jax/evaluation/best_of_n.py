"""Best of n: what a policy gives if the response with the highest reward of n samples is taken.

It needs no training: one pool of samples serves every reward, as another ranking of the same
responses. The KL to the policy that was sampled from is at most log n − (n − 1) / n, and equal to
it if no two responses of a prompt have the same reward (Stiennon et al., arXiv 2009.01325; Beirami
et al., arXiv 2401.01879).
"""

from collections.abc import Sequence

import numpy as np
from scipy.special import gammaln


def best_of_n(reward_ps: np.ndarray, value_ps: np.ndarray, n: int) -> np.ndarray:
    """Returns the mean value of the best of n responses by reward, `[P]`, for each prompt.

    Args:
        reward_ps: reward of S samples for each of P prompts.
        value_ps: value of the same samples, such as the true reward.
        n: samples of which the best is taken, from 1 to S.

    Raises:
        ValueError: n is out of range, or a reward is NaN.
    """
    (weight_ps,) = best_of_n_weights(reward_ps, [n])
    return (weight_ps * value_ps).sum(axis=1)


def best_of_n_weights(reward_ps: np.ndarray, sizes: Sequence[int]) -> np.ndarray:
    """Returns how often each sample is the best of n samples of its prompt, `[N, P, S]`.

    It is the exact share of all subsets of n of a prompt's S samples, not of random draws. Of
    responses with equal rewards each is equally often the best. A reward of −inf is that of a
    response that is taken only if there is no other.

    Args:
        reward_ps: reward of S samples for each of P prompts.
        sizes: N values of n, from 1 to S.

    Raises:
        ValueError: an n is out of range, or a reward is NaN.
    """
    samples = reward_ps.shape[1]
    for n in sizes:
        if not 1 <= n <= samples:
            raise ValueError(f"n={n}: expected 1 to {samples}, the samples of a prompt")
    if np.isnan(reward_ps).any():
        raise ValueError("a reward is NaN")
    by_rank_ns = np.stack([_weights(samples, n) for n in sizes])
    weight_nps = np.empty((len(sizes), *reward_ps.shape))
    for p, reward_s in enumerate(reward_ps):
        order = np.argsort(reward_s, kind="stable")
        _, first, tie_s, count = np.unique(
            reward_s[order], return_index=True, return_inverse=True, return_counts=True
        )
        tied_weight = np.add.reduceat(by_rank_ns, first, axis=1) / count
        weight_nps[:, p, order] = tied_weight[:, tie_s]
    return weight_nps


def _weights(samples: int, n: int) -> np.ndarray:
    """Returns how often the sample of each rank, from the worst, is the best of n, `[S]`."""
    below_s = np.arange(samples)  # samples that are worse
    possible = below_s >= n - 1
    log_s = np.full(samples, -np.inf)
    log_s[possible] = _log_choose(below_s[possible], n - 1) - _log_choose(np.array(samples), n)
    return np.exp(log_s)


def _log_choose(of: np.ndarray, k: int) -> np.ndarray:
    return gammaln(of + 1) - gammaln(k + 1) - gammaln(of - k + 1)


def kl_of_best_of(n: np.ndarray | int) -> np.ndarray:
    """Returns the KL of the best of n to the policy that was sampled from, in nats."""
    n = np.asarray(n, np.float64)
    return np.log(n) - (n - 1) / n
