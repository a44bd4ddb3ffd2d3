"""The penalty on features that fire, and the cap on what penalties take from a score.

    penalty_i = α_i · 1[z_i > τ_i]             latents z, thresholds τ, penalties α
    taken     = min(Σ, cap · σ)                Σ: everything that is taken from one response

σ is the standard deviation of the scores. α is in the reward model's units if the unit is "score",
and in σ if it is "sd"; the cap is always in σ. Everything is NumPy and float32.
"""

from collections.abc import Sequence

import numpy as np

from sarm_jax.io.errors import InputError


def unit_scale(unit: str, score_std: float) -> np.float32:
    """Returns the size of one unit of α in the reward model's units: σ for "sd", else 1.

    Raises:
        InputError: the unit is "sd", and all scores are equal, so that σ is 0.
    """
    if unit == "sd" and score_std == 0:
        raise InputError(
            "reward.unit='sd': the scores are all equal, so that they have no standard deviation "
            "in which reward.alpha_values could be measured; use reward.unit='score'"
        )
    return np.float32(score_std if unit == "sd" else 1.0)


def fired_penalties(
    z_bn: np.ndarray,
    *,
    tau_values: Sequence[float],
    alpha_values: Sequence[float],
    scale: np.float32,
) -> np.ndarray:
    """Returns α_i · 1[z_i > τ_i] in the reward model's units, float32 `[B, N]`.

    The penalty of a latent that is not finite is NaN. Otherwise the penalty would be waived,
    because every comparison with NaN is false.

    Args:
        z_bn: latents of the penalised features, without any clamp or steering.
        tau_values: threshold of each feature.
        alpha_values: penalty of each feature, not negative.
        scale: the size of one unit of α, from `unit_scale`.
    """
    tau_n = np.asarray(tau_values, np.float32)
    alpha_n = np.asarray(alpha_values, np.float32)
    penalty_bn = np.where(z_bn > tau_n, scale * alpha_n, np.float32(0))
    return np.where(np.isfinite(z_bn), penalty_bn, np.float32("nan"))


def cap_in_score(penalty_cap: float, score_std: float) -> np.float32:
    """Returns the cap in the reward model's units.

    There is no cap if all scores are equal, such as those of a single response, because σ is then 0
    and cannot serve as a unit.
    """
    return np.float32(penalty_cap * score_std) if score_std > 0 else np.float32("inf")


def capped(sum_b: np.ndarray, cap: np.float32) -> np.ndarray:
    """Returns min(Σ, cap) for the sum Σ of what is taken from each response, `[B]`."""
    return np.minimum(sum_b, cap)


def share_within_cap(sum_b: np.ndarray, cap: np.float32) -> np.ndarray:
    """Returns the factor min(1, cap / Σ), `[B]`, that scales the terms of Σ down to the cap."""
    share_b = np.ones_like(sum_b)
    np.divide(cap, sum_b, out=share_b, where=sum_b > cap)
    return share_b
