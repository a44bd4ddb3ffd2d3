"""Statistics of all M features on preference pairs, computed block by block.

    differential   s_i = (c_i − j_i) / (a_i + C),   C = mean(a) + 1e-9
c and j are the means of z_i on the chosen and on the rejected responses. a is the sum of the means
of |z_i| on both, which is c + j if no latent is negative (see `identify`).

Test: `median_test`. Correction: Benjamini–Yekutieli (2001) over all latents that differ anywhere,
not only the selected ones. Latents of a TopK code compete, so some are negatively dependent.
Benjamini–Hochberg does not cover that; Benjamini–Yekutieli holds under any dependence.
"""

import dataclasses

import numpy as np
from scipy import stats

from sarm_jax.features.median_test import MedianTest
from sarm_jax.models.latent_store import Contrast

FOLDS = 10  # of the prompts; the stability compares random halves of these folds
HALVES = 20


@dataclasses.dataclass(frozen=True)
class ContrastStatistics:
    """Means, firing rates and p values of all features, with sums by source and fold.

    Attributes:
        chosen_f: mean z `[M]` of the chosen responses.
        rejected_f: mean z `[M]` of the rejected responses.
        activity_f: a `[M]`, the mean |z| of both sides added up.
        fires_chosen_f: share `[M]` of the chosen responses with z > 0.
        fires_rejected_f: share `[M]` of the rejected responses with z > 0.
        p_f: p values `[M]`; 1 if a latent never differs between the sides.
        q_f: p values `[M]` after Benjamini–Yekutieli.
        chosen_sf: sums `[S, F, M]` of z of the chosen responses by source and fold.
        rejected_sf: the same of the rejected responses.
        activity_sf: the same of |z| of both sides.
        pairs_s: number of pairs `[S, F]` by source and fold.
    """

    chosen_f: np.ndarray
    rejected_f: np.ndarray
    activity_f: np.ndarray
    fires_chosen_f: np.ndarray
    fires_rejected_f: np.ndarray
    p_f: np.ndarray
    q_f: np.ndarray
    chosen_sf: np.ndarray
    rejected_sf: np.ndarray
    activity_sf: np.ndarray
    pairs_s: np.ndarray


def differential(c: np.ndarray, j: np.ndarray, activity: np.ndarray) -> np.ndarray:
    """Computes s `[M]` from c, j and a `[M]`."""
    return (c - j) / (activity + activity.mean() + 1e-9)


def measure_contrast(
    contrast: Contrast, prompt_p: np.ndarray, source_p: np.ndarray, fold_p: np.ndarray
) -> ContrastStatistics:
    """Computes the statistics of all features in one pass over their blocks.

    Args:
        contrast: latents of the pairs.
        prompt_p: number of the prompt of each pair, from 0.
        source_p: number of the source of each pair, from 0.
        fold_p: number of the fold of each pair, from 0.
    """
    size, sources = contrast.size, int(source_p.max()) + 1
    folds = int(fold_p.max()) + 1
    member_gp = _indicator(source_p * folds + fold_p, sources * folds)
    test = MedianTest.from_pairs(prompt_p, contrast.chosen_p, contrast.rejected_p)
    mean_f, fires_f = np.zeros((3, size), np.float32), np.zeros((2, size))
    sum_gf = np.zeros((3, len(member_gp), size), np.float32)
    p_f = np.full(size, np.nan)
    for ids, z_nb in contrast.latents_by_block():
        chosen_pb, rejected_pb = contrast.sides(z_nb)
        quantities = chosen_pb, rejected_pb, np.abs(chosen_pb) + np.abs(rejected_pb)
        for index, z_pb in enumerate(quantities):
            mean_f[index, ids] = z_pb.mean(axis=0)
            sum_gf[index][:, ids] = member_gp @ z_pb
        fires_f[:, ids] = [(z_pb > 0).mean(axis=0) for z_pb in (chosen_pb, rejected_pb)]
        p_f[ids] = test(z_nb)
    differs_f = np.isfinite(p_f)
    q_f = np.ones(size)
    if differs_f.any():
        q_f[differs_f] = stats.false_discovery_control(p_f[differs_f], method="by")
    sums_by_source = sum_gf.reshape(3, sources, folds, size)
    pairs_s = member_gp.sum(axis=1).reshape(sources, folds)
    return ContrastStatistics(
        chosen_f=mean_f[0],
        rejected_f=mean_f[1],
        activity_f=mean_f[2],
        fires_chosen_f=fires_f[0],
        fires_rejected_f=fires_f[1],
        p_f=np.where(differs_f, p_f, 1),
        q_f=q_f,
        chosen_sf=sums_by_source[0],
        rejected_sf=sums_by_source[1],
        activity_sf=sums_by_source[2],
        pairs_s=pairs_s,
    )


def assign_folds(prompt_p: np.ndarray, seed: int) -> np.ndarray:
    """Assigns each pair to a fold; all pairs of one prompt share a fold."""
    prompts = int(prompt_p.max()) + 1
    shuffled = np.random.default_rng(seed).permutation(prompts)
    return (shuffled % min(FOLDS, prompts))[prompt_p]


def half_differentials(statistics: ContrastStatistics, seed: int) -> np.ndarray:
    """Computes s `[R, M]` on random halves of the folds; R is 0 if there are fewer than two."""
    folds = statistics.pairs_s.shape[1]
    rng = np.random.default_rng(seed)
    halves = [rng.permutation(folds)[: folds // 2] for _ in range(HALVES)] if folds > 1 else []
    rows = []
    for half in halves:
        pairs = max(statistics.pairs_s[:, half].sum(), 1)
        sums = statistics.chosen_sf, statistics.rejected_sf, statistics.activity_sf
        c, j, activity = (x[:, half].sum(axis=(0, 1)) / pairs for x in sums)
        rows.append(differential(c, j, activity))
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
    """Computes 95 % percentile intervals of s by resampling prompts.

    Args:
        chosen_pn: z of n features on the chosen response of each pair.
        rejected_pn: z of the same features on the rejected response.
        total_p: sum of |z| over all latents of both sides of each pair; it gives C, which is
            resampled as well.
        size: number of latents M.
        prompt_p: number of the prompt of each pair, from 0.
        resamples: number of bootstrap samples.
        seed: seed of the samples.

    Returns:
        Low and high ends `[2, n]`.
    """
    prompts = int(prompt_p.max()) + 1
    activity_pn = np.abs(chosen_pn) + np.abs(rejected_pn)
    columns_pa = np.column_stack(
        [chosen_pn, rejected_pn, activity_pn, total_p, np.ones(len(prompt_p))]
    )
    sums_qa = np.zeros((prompts, columns_pa.shape[1]))
    np.add.at(sums_qa, prompt_p, columns_pa)
    rng, n = np.random.default_rng(seed), chosen_pn.shape[1]
    s_rn = np.zeros((resamples, n))
    for r in range(resamples):
        weight_q = np.bincount(rng.integers(prompts, size=prompts), minlength=prompts)
        sums_a = weight_q @ sums_qa
        mean_a = sums_a[:-1] / sums_a[-1]
        c, j, activity = np.split(mean_a[:-1], 3)
        s_rn[r] = (c - j) / (activity + mean_a[-1] / size + 1e-9)
    return np.percentile(s_rn, [2.5, 97.5], axis=0)


def row_totals(contrast: Contrast) -> np.ndarray:
    """Sums |z| over all latents of both sides of each pair, `[P]` float64."""
    total_p = np.zeros(len(contrast))
    for _, z_nb in contrast.latents_by_block():
        total_n = np.abs(z_nb).sum(axis=1, dtype=np.float64)
        total_p += total_n[contrast.chosen_p] + total_n[contrast.rejected_p]
    return total_p


def _indicator(group_p: np.ndarray, groups: int) -> np.ndarray:
    """Marks the members of each group, `[G, P]` float32."""
    return (group_p[None, :] == np.arange(groups)[:, None]).astype(np.float32)
