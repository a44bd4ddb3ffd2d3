"""The few lengths that the prompts of a batch are padded to.

One length for all batches would be that of the longest prompt of the file: of the 3,184 prompts of
the reference one has 1,589 tokens, and the longest of a batch of 8 has 191 on average. A length for
every batch would be a program to compile for each. This module chooses as few lengths as keep the
expected padding below a bound. Padding is masked, so the choice does not affect results beyond the
rounding of sums in another order.
"""

import re

import numpy as np
from numpy.typing import ArrayLike

from sarm_jax.io.errors import InputError
from sarm_jax.io.jsonl import read_bytes, short
from sarm_jax.io.strict_json import parse_json

MULTIPLE = 8  # every length is one, for matrix units
WASTE = 0.2  # token positions more than the batches' own longest prompts need, in expectation
MOST_LENGTHS = 6
MOST_CANDIDATES = 512  # lengths to choose from; longer files get coarser multiples
MOST_PROMPTS = 10_000_000  # that a file of counts may stand for


def padded_lengths(
    lengths_n: ArrayLike, batch_size: int, new_tokens: int, waste: float = WASTE
) -> tuple[int, ...]:
    """Returns the padded lengths of prompts, ascending; the last one holds every prompt.

    Args:
        lengths_n: tokens of every prompt.
        batch_size: prompts in a batch, a uniform draw without replacement.
        new_tokens: columns after the prompt, which every batch has.
        waste: bound on E[padded length + new_tokens] / E[own longest + new_tokens] − 1. Multiples
            of 8 and `MOST_LENGTHS` lengths can miss it for very short prompts.
    """
    longest_m, p_m = longest_of_a_batch(lengths_n, batch_size)
    bound = (1 + waste) * float(p_m @ (longest_m + new_tokens))
    multiple = MULTIPLE * -(-int(longest_m[-1]) // (MULTIPLE * MOST_CANDIDATES))
    rounded_m = -multiple * (-longest_m // multiple)
    candidates_c = np.unique(rounded_m)
    p_c = np.asarray([p_m[rounded_m == length].sum() for length in candidates_c])
    # best_c: the least expected length of the batches up to candidate c if c is the last length.
    below_c = np.cumsum(p_c)
    best_c: np.ndarray = candidates_c * below_c
    previous: list[np.ndarray] = []
    lengths = min(MOST_LENGTHS, len(candidates_c))
    while best_c[-1] + new_tokens > bound and len(previous) + 1 < lengths:
        # cost_ic: candidate i is the length before c, and takes the batches up to itself.
        cost_ic = best_c[:, None] + candidates_c * (below_c - below_c[:, None])
        cost_ic[np.tril_indices(len(candidates_c))] = np.inf
        previous.append(cost_ic.argmin(axis=0))
        best_c = cost_ic.min(axis=0)
    chosen = [len(candidates_c) - 1]
    for from_c in reversed(previous):
        chosen.append(int(from_c[chosen[-1]]))
    return tuple(int(length) for length in candidates_c[sorted(chosen)])


def longest_of_a_batch(lengths_n: ArrayLike, batch_size: int) -> tuple[np.ndarray, np.ndarray]:
    """Returns (distinct lengths, the probability of each to be a batch's longest prompt).

    P(longest ≤ x) = C(n_x, B) / C(N, B), with n_x prompts of at most x tokens: a batch of B is
    drawn without replacement. A batch of all prompts or more always meets the longest.
    """
    distinct_m, count_m = np.unique(np.asarray(lengths_n, np.int64), return_counts=True)
    total = count_m.sum()
    if batch_size >= total:
        return distinct_m[-1:], np.ones(1)
    at_most_m = np.cumsum(count_m)
    # C(n, B) / C(N, B) = Π (n − i) / (N − i), of which a factor is 0 for n < B.
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

    Raises InputError, which calls the file `name`, for anything else.
    """
    try:
        counts = parse_json(read_bytes(path, name).decode("utf-8"))
    except ValueError as error:
        raise InputError(f"{name}: not JSON ({error})") from None
    if not isinstance(counts, dict) or not counts:
        expected = 'a JSON object {"tokens": prompts, …} with at least one length'
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

    Raises InputError, which calls the prompts `name`, if one is too long and `long_prompts` is
    "error", or if all are dropped.
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
