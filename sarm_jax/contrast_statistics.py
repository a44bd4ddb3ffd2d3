"""What all M features do on preference pairs, block by block: means, rates, tests, stability.

    differential   s_i = (c_i − j_i) / (c_i + j_i + C),   C = mean(c + j) + 1e-9
with c and j the means of z_i on chosen and rejected responses (see `features`).

Test: the exact two-sided sign test. For each prompt the mean of z_i on chosen minus rejected is
taken, since pairs of one prompt are not independent; prompts without a difference say nothing.
Under the null either sign is equally likely. It needs no shape of the differences, which matters
for latents that are 0 nearly everywhere; a t test is too bold there.
Correction: Benjamini–Yekutieli (2001) over all latents that differ anywhere, not only the selected
ones. Latents of a TopK code compete, so some are negatively dependent; Benjamini–Hochberg does not
cover that, Benjamini–Yekutieli holds under any dependence.
"""

import dataclasses

import numpy as np
from scipy import stats

from sarm_jax.latent_store import Contrast

FOLDS = 10  # of the prompts; halves of them are what stability compares
HALVES = 20


@dataclasses.dataclass(frozen=True)
class ContrastStatistics:
    """Arrays over features `[M]`; sums `[S, F, M]` over sources and folds with pairs `[S, F]`."""

    chosen_f: np.ndarray
    rejected_f: np.ndarray
    fires_chosen_f: np.ndarray
    fires_rejected_f: np.ndarray
    p_f: np.ndarray
    q_f: np.ndarray
    chosen_sf: np.ndarray
    rejected_sf: np.ndarray
    pairs_s: np.ndarray


def differential(c: np.ndarray, j: np.ndarray) -> np.ndarray:
    """s `[M]` of the mean latents of chosen and rejected responses."""
    return (c - j) / (c + j + (c + j).mean() + 1e-9)


def measure(
    contrast: Contrast, prompt_p: np.ndarray, source_p: np.ndarray, fold_p: np.ndarray
) -> ContrastStatistics:
    """Runs over the blocks once; `prompt_p`, `source_p`, `fold_p` number the pairs from 0."""
    size, sources = contrast.size, int(source_p.max()) + 1
    folds = int(fold_p.max()) + 1
    member_gp = _indicator(source_p * folds + fold_p, sources * folds)
    order = np.argsort(prompt_p, kind="stable")
    first = np.searchsorted(prompt_p[order], np.arange(prompt_p.max() + 1))
    mean_f, fires_f = np.zeros((2, size), np.float32), np.zeros((2, size))
    sum_gf = np.zeros((2, len(member_gp), size), np.float32)
    p_f, differs_f = np.ones(size), np.zeros(size, bool)
    for ids, *sides in contrast.blocks():
        for side, z_pb in enumerate(sides):
            mean_f[side, ids] = z_pb.mean(axis=0)
            fires_f[side, ids] = (z_pb > 0).mean(axis=0)
            sum_gf[side][:, ids] = member_gp @ z_pb
        by_prompt = np.add.reduceat((sides[0] - sides[1])[order].astype(np.float64), first, axis=0)
        more, less = (by_prompt > 0).sum(axis=0), (by_prompt < 0).sum(axis=0)
        p_f[ids] = np.minimum(1, 2 * stats.binom.cdf(np.minimum(more, less), more + less, 0.5))
        differs_f[ids] = more + less > 0
    shaped = sum_gf.reshape(2, sources, folds, size)
    q_f = np.ones(size)
    if differs_f.any():
        q_f[differs_f] = stats.false_discovery_control(p_f[differs_f], method="by")
    pairs_s = member_gp.sum(axis=1).reshape(sources, folds)
    return ContrastStatistics(
        chosen_f=mean_f[0],
        rejected_f=mean_f[1],
        fires_chosen_f=fires_f[0],
        fires_rejected_f=fires_f[1],
        p_f=p_f,
        q_f=q_f,
        chosen_sf=shaped[0],
        rejected_sf=shaped[1],
        pairs_s=pairs_s,
    )


def folds_of(prompt_p: np.ndarray, seed: int) -> np.ndarray:
    """The fold of each pair; pairs of one prompt share theirs."""
    prompts = int(prompt_p.max()) + 1
    shuffled = np.random.default_rng(seed).permutation(prompts)
    return (shuffled % min(FOLDS, prompts))[prompt_p]


def half_differentials(found: ContrastStatistics, seed: int) -> np.ndarray:
    """s `[R, M]` on random halves of the folds; R = 0 where there are fewer than two."""
    folds = found.pairs_s.shape[1]
    rng = np.random.default_rng(seed)
    halves = [rng.permutation(folds)[: folds // 2] for _ in range(HALVES)] if folds > 1 else []
    rows = []
    for half in halves:
        pairs = max(found.pairs_s[:, half].sum(), 1)
        c = found.chosen_sf[:, half].sum(axis=(0, 1)) / pairs
        rows.append(differential(c, found.rejected_sf[:, half].sum(axis=(0, 1)) / pairs))
    return np.array(rows).reshape(len(rows), -1)


def bootstrap_differential(
    chosen_pn: np.ndarray,
    rejected_pn: np.ndarray,
    total_p: np.ndarray,
    size: int,
    prompt_p: np.ndarray,
    resamples: int,
    seed: int,
) -> np.ndarray:
    """Low and high `[2, n]` of the 95 % percentile interval of s, prompts being resampled.

    `total_p` is the sum of all latents of both sides of a pair; C is resampled with the rest.
    """
    prompts = int(prompt_p.max()) + 1
    columns_pa = np.column_stack([chosen_pn, rejected_pn, total_p, np.ones(len(prompt_p))])
    sums_qa = np.zeros((prompts, columns_pa.shape[1]))
    np.add.at(sums_qa, prompt_p, columns_pa)
    rng, n = np.random.default_rng(seed), chosen_pn.shape[1]
    s_rn = np.zeros((resamples, n))
    for r in range(resamples):
        weight_q = np.bincount(rng.integers(prompts, size=prompts), minlength=prompts)
        sums_a = weight_q @ sums_qa
        mean_a = sums_a[:-1] / sums_a[-1]
        c, j, constant = mean_a[:n], mean_a[n : 2 * n], mean_a[2 * n] / size + 1e-9
        s_rn[r] = (c - j) / (c + j + constant)
    return np.percentile(s_rn, [2.5, 97.5], axis=0)


def row_totals(contrast: Contrast) -> np.ndarray:
    """The sum of all latents of both sides, `[P]` float64."""
    total_p = np.zeros(len(contrast))
    for _, chosen_pb, rejected_pb in contrast.blocks():
        total_p += chosen_pb.sum(axis=1, dtype=np.float64)
        total_p += rejected_pb.sum(axis=1, dtype=np.float64)
    return total_p


def _indicator(group_p: np.ndarray, groups: int) -> np.ndarray:
    return (group_p[None, :] == np.arange(groups)[:, None]).astype(np.float32)
