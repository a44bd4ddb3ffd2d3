"""The median test within prompts: by hand, against the sign test and loops, and under the null."""

import itertools

import numpy as np
import pytest
from scipy import stats

from sarm_jax.features.median_test import MedianTest


def groups(prompts, rejected, rng=None, chosen=1):
    """Pairs every chosen with every rejected response of each prompt.

    Returns:
        (prompt, chosen row, rejected row) of each pair, and the rows of each prompt.
    """
    count = prompts * (chosen + rejected)
    row = np.arange(count) if rng is None else rng.permutation(count)
    row = row.reshape(prompts, chosen + rejected)
    pairs = [
        (n, row[n, c], row[n, chosen + r])
        for n, c, r in itertools.product(range(prompts), range(chosen), range(rejected))
    ]
    return (*np.array(pairs).T, row)


def test_by_hand():
    # Three prompts, each with one chosen and two rejected responses, one of which fires: μ = 1.
    prompt, chosen, rejected, row = groups(3, 2)
    z = np.zeros((9, 2))
    z[row[:, 1], 0] = 1.0  # always a rejected response: T = 0, one below μ
    z[row[:, 0], 1] = 1.0  # always the chosen response: T = 3
    p = MedianTest.from_pairs(prompt, chosen, rejected)(z)
    np.testing.assert_allclose(p, [2 * (2 / 3) ** 3, 2 * (1 / 3) ** 3], rtol=1e-12)


def test_one_pair_per_prompt_is_the_exact_sign_test():
    rng = np.random.default_rng(0)
    prompt, chosen, rejected, _ = groups(41, 1, rng)
    z = np.maximum(rng.normal(0.3, 1, (82, 30)), 0) + rng.normal(0, 1, 30) * (np.arange(30) > 20)
    z[chosen, :10] *= 1.5
    p = MedianTest.from_pairs(prompt, chosen, rejected)(z)
    for i in range(30):
        more = (z[chosen, i] > z[rejected, i]).sum()
        less = (z[chosen, i] < z[rejected, i]).sum()
        assert p[i] == pytest.approx(stats.binomtest(int(more), int(more + less)).pvalue)


def test_against_loops_over_prompts_of_every_shape():
    rng = np.random.default_rng(1)
    prompt, chosen, rejected = [], [], []
    for n in range(25):  # up to three chosen and four rejected responses; some rows on both sides
        rows = 10 * n + rng.permutation(10)
        chosen_rows, rejected_rows = rows[: rng.integers(1, 4)], rows[3 : 3 + rng.integers(1, 5)]
        for c, r in itertools.product(chosen_rows, rejected_rows):
            prompt.append(n), chosen.append(c), rejected.append(r)
        if n % 5 == 0:
            prompt.append(n), chosen.append(rejected_rows[0]), rejected.append(rows[9])
    prompt, chosen, rejected = map(np.array, (prompt, chosen, rejected))
    z = np.where(rng.random((250, 8)) < 0.3, rng.normal(0.5, 1, (250, 8)), 0)
    p = MedianTest.from_pairs(prompt, chosen, rejected)(z)
    for i in range(8):
        high, trials, mean = 0, 0, 0.0
        for n in range(25):
            chosen_rows, rejected_rows = {*chosen[prompt == n]}, {*rejected[prompt == n]}
            units = sorted(chosen_rows ^ rejected_rows)
            values = np.array([z[u, i] for u in units])
            above = values > np.median(values)
            labels = np.array([u in chosen_rows for u in units])
            if above.any() and labels.any() and not labels.all():
                high += (above & labels).sum()
                trials += labels.sum()
                mean += labels.sum() * above.mean()
        tail = stats.binom(trials, mean / trials)
        one_sided = tail.cdf(high) if high < mean else tail.sf(high - 1)
        expected = 1.0 if abs(high - mean) < 1 else min(1.0, 2 * one_sided)
        assert p[i] == pytest.approx(expected)


def test_prompts_that_contribute_nothing_have_no_p():
    prompt, chosen, rejected, _ = groups(4, 2)
    assert np.isnan(MedianTest.from_pairs(prompt, chosen, rejected)(np.ones((12, 2)))).all()


@pytest.mark.parametrize("rejected_per_chosen", [1, 2, 6])
@pytest.mark.parametrize("rate", [0.03, 1.0])
def test_false_positives_under_the_null_keep_the_level(rejected_per_chosen, rate):
    rng = np.random.default_rng(2)
    prompt, chosen, rejected, row = groups(300, rejected_per_chosen)
    z = np.where(rng.random((row.size, 2000)) < rate, rng.exponential(size=(row.size, 2000)), 0)
    p = MedianTest.from_pairs(prompt, chosen, rejected)(z)
    for level in (0.05, 0.01):
        bound = stats.binom.ppf(0.999, 2000, level) / 2000
        assert np.nanmean(p <= level) <= bound
    z[row[:, 0]] *= rng.random((300, 2000)) < 0.3  # the chosen answers fire less often
    effect = MedianTest.from_pairs(prompt, chosen, rejected)(z)
    assert np.mean(effect <= 0.05) > 0.3
