"""Chooses the few lengths that the prompts of a batch are padded to.

With one length for all batches, every batch would be padded to the longest prompt of the file. The
longest of the 3,184 prompts of the reference has 1,589 tokens, but the longest of a batch of 8 has
187 on average. With a length for every batch, every length would need programs of its own. This
module chooses the smallest number of lengths that keeps the expected padding below a bound. Padding
is masked, so the choice affects results only by the rounding of sums in another order.
"""

import re

import numpy as np
from numpy.typing import ArrayLike

from sarm_jax.io.errors import InputError
from sarm_jax.io.json_files import read_json, short

MULTIPLE = 8  # every length is a multiple of it, which suits matrix units
WASTE = 0.2  # expected share of token positions beyond those that the longest prompts need
MOST_LENGTHS = 6
MOST_CANDIDATES = 512  # lengths to choose from; longer prompts give coarser multiples
MOST_PROMPTS = 10_000_000  # in a file of counts


def padded_lengths(
    lengths_n: ArrayLike, batch_size: int, new_tokens: int, waste: float = WASTE
) -> tuple[int, ...]:
    """Returns the padded lengths of prompts, ascending; the last one holds every prompt.

    Args:
        lengths_n: number of tokens of every prompt.
        batch_size: number of prompts in a batch, which are drawn uniformly without replacement.
        new_tokens: number of columns after the prompt, the same for every batch.
        waste: bound on E[padded length + new_tokens] / E[own longest + new_tokens] − 1. For very
            short prompts it can be exceeded, since there are at most `MOST_LENGTHS` lengths and
            all are multiples of 8.
    """
    longest_m, p_m = longest_of_a_batch(lengths_n, batch_size)
    bound = (1 + waste) * float(p_m @ (longest_m + new_tokens))
    multiple = MULTIPLE * -(-int(longest_m[-1]) // (MULTIPLE * MOST_CANDIDATES))
    rounded_m = -multiple * (-longest_m // multiple)
    candidates_c = np.unique(rounded_m)
    p_c = np.asarray([p_m[rounded_m == length].sum() for length in candidates_c])
    # best_c: the smallest expected length of the batches up to candidate c, if c is the last one.
    below_c = np.cumsum(p_c)
    best_c: np.ndarray = candidates_c * below_c
    previous: list[np.ndarray] = []
    lengths = min(MOST_LENGTHS, len(candidates_c))
    while best_c[-1] + new_tokens > bound and len(previous) + 1 < lengths:
        # cost_ic: the same if candidate i is the length before c.
        cost_ic = best_c[:, None] + candidates_c * (below_c - below_c[:, None])
        cost_ic[np.tril_indices(len(candidates_c))] = np.inf
        previous.append(cost_ic.argmin(axis=0))
        best_c = cost_ic.min(axis=0)
    chosen = [len(candidates_c) - 1]
    for from_c in reversed(previous):
        chosen.append(int(from_c[chosen[-1]]))
    return tuple(int(length) for length in candidates_c[sorted(chosen)])


def longest_of_a_batch(lengths_n: ArrayLike, batch_size: int) -> tuple[np.ndarray, np.ndarray]:
    """Returns (distinct lengths, probability of each that it is the longest of a batch).

    P(longest ≤ x) = C(n_x, B) / C(N, B) for a batch of B of the N prompts, drawn without
    replacement, of which n_x have at most x tokens. If B ≥ N, every batch has the longest prompt.
    """
    distinct_m, count_m = np.unique(np.asarray(lengths_n, np.int64), return_counts=True)
    total = count_m.sum()
    if batch_size >= total:
        return distinct_m[-1:], np.ones(1)
    at_most_m = np.cumsum(count_m)
    # C(n, B) / C(N, B) = Π_i (n − i) / (N − i); for n < B one of the factors is 0.
    drawn_i = np.arange(batch_size)
    factors_mi = np.maximum(at_most_m[:, None] - drawn_i, 0) / (total - drawn_i)
    return distinct_m, np.diff(factors_mi.prod(axis=1), prepend=0.0)


def batch_shares(lengths_n: ArrayLike, batch_size: int, new_tokens: int) -> dict[int, float]:
    """Returns the expected share of the batches by padded length; arguments as `padded_lengths`."""
    padded = padded_lengths(lengths_n, batch_size, new_tokens)
    longest_m, p_m = longest_of_a_batch(lengths_n, batch_size)
    shares = np.bincount(np.searchsorted(padded, longest_m), weights=p_m, minlength=len(padded))
    return dict(zip(padded, (shares / shares.sum()).tolist(), strict=True))


def read_lengths(path: str, name: str) -> np.ndarray:
    """Reads a JSON object {"tokens": prompts of that length, …}; returns the tokens of each prompt.

    Raises:
        InputError: the file has other content; the message calls it `name`.
    """
    expected = 'a JSON object {"tokens": prompts, …} with at least one length'
    counts = read_json(path, name, expected=expected, allow_nan=False)
    if not counts:
        raise InputError(f"{name}: expected {expected}, found {short(counts)}")
    for length, count in counts.items():
        if not re.fullmatch("[1-9][0-9]{0,8}", length):
            raise InputError(f"{name}: found length {length[:60]!r}, expected tokens, at least 1")
        if type(count) is not int or count < 1:
            raise InputError(
                f"{name}: found {short(count)} prompts of {length} tokens, expected a whole "
                "number, at least 1"
            )
    if (total := sum(counts.values())) > MOST_PROMPTS:
        raise InputError(f"{name}: counts {total:,} prompts, at most {MOST_PROMPTS:,} are taken")
    return np.repeat(np.asarray([int(length) for length in counts]), list(counts.values()))


def fitting_lengths(
    lengths_n: np.ndarray, max_tokens: int, long_prompts: str, name: str
) -> np.ndarray:
    """Applies `ppo.long_prompts` to the tokens of prompts, as a run does to their texts.

    Raises:
        InputError: a prompt is too long and `long_prompts` is "error", or all are dropped; the
            message calls the prompts `name`.
    """
    long = int((lengths_n > max_tokens).sum())
    too_long = (
        f"{name}: {long} of {len(lengths_n)} prompts have more than "
        f"ppo.max_prompt_tokens={max_tokens} tokens"
    )
    if long and long_prompts == "error":
        raise InputError(
            f"{too_long}, the longest {lengths_n.max()}: raise it, or set ppo.long_prompts=drop or "
            "ppo.long_prompts=truncate"
        )
    if long == len(lengths_n) and long_prompts == "drop":
        raise InputError(f"{too_long}, and ppo.long_prompts=drop leaves none")
    if long_prompts == "drop":
        return lengths_n[lengths_n <= max_tokens]
    return np.minimum(lengths_n, max_tokens)
