"""The features through which training moved the score: the largest changes of mean w_i · z_i."""

import numpy as np

from ppo.comparison.policy_comparison import BASE, HUMAN, Comparison
from sarm_jax.models.latent_store import feature_blocks


def rows_by_group(comparison: Comparison) -> dict[str, np.ndarray]:
    """Returns the rows of the latents of every policy, and of the human responses if any."""
    names = [name for name, _, _ in comparison.texts]
    order = dict.fromkeys([*([HUMAN] if HUMAN in names else []), *comparison.responses])
    return {group: np.flatnonzero([name == group for name in names]) for group in order}


def movers(comparison: Comparison, count: int) -> list[int]:
    """Returns at most `count` features, the one that moved a policy's mean score most first.

    The change of a feature is |w_i (mean z_i of a policy − mean z_i of the base)|, the largest over
    all policies. Features without a change are left out.
    """
    groups, latents = rows_by_group(comparison), comparison.latents
    trained = [name for name in comparison.responses if name != BASE]
    change_f = np.zeros(latents.size)
    for ids in feature_blocks(latents.size, len(latents)):
        z_nk = latents.columns(ids).astype(np.float64)  # the K features of a block
        base_k = z_nk[groups[BASE]].mean(axis=0)
        for name in trained:
            moved_k = np.abs(comparison.weight_f[ids] * (z_nk[groups[name]].mean(axis=0) - base_k))
            change_f[ids] = np.maximum(change_f[ids], moved_k)
    order = np.argsort(-change_f, kind="stable")[:count]
    return [int(i) for i in order if change_f[i] > 0]
