"""Causal certificates: tests whether changing a feature does more than changing similar ones.

For every probed feature, controls are drawn at random from the active features that are nearest to
it in firing rate and mean activation. Let e_i be the effect on prompt i: the change of the margin
of a pair or of the reward or, in best-of-N, whether another candidate is selected.
    effect      mean e_i, with an interval
    excess      mean of |e_i| − the controls' mean |e_i| on the same prompt, with an interval;
                `controls_above` counts the controls whose own mean |e_i| is larger
Both are tested by flipping the signs of whole prompts at random. The test of the effect is
two-sided, that of the excess one-sided; best-of-N tests only the excess, since e_i is never
negative. A feature needs both, so the larger p value counts (an intersection-union test). Holm's
step-down procedure corrects for the number of probed features.
"""

import dataclasses
from collections.abc import Sequence
from typing import Any

import numpy as np

from sarm_jax.io.errors import InputError
from sarm_jax.reporting.spread import ROUNDING
from sarm_jax.reporting.statistics import holm, mean_interval

CANDIDATES_PER_CONTROL = 5  # size of the pool of nearest features, for each control drawn from it


@dataclasses.dataclass(frozen=True)
class CertificateConfig:
    """Options of the certificates.

    Attributes:
        controls: number of control features for each probed feature.
        flips: number of random sign patterns in the test.
        level: significance level after Holm's correction.
        seed: seed of the controls and of the sign patterns.
    """

    controls: int = 10
    flips: int = 9999
    level: float = 0.05
    seed: int = 0

    def __post_init__(self) -> None:
        for name, least in (("controls", 1), ("flips", 99), ("seed", 0)):
            if getattr(self, name) < least:
                raise InputError(f"probe.{name}={getattr(self, name)}: must be at least {least}")
        if not 0 < self.level < 1:
            raise InputError(f"probe.level={self.level}: must lie in (0, 1)")


def matched_controls(
    features: Sequence[int], rate_f: np.ndarray, mean_f: np.ndarray, config: CertificateConfig
) -> dict[int, list[int]]:
    """Draws control features that resemble each probed feature and are not probed themselves.

    The distance is Euclidean in the logarithms of firing rate and mean activation.

    Args:
        features: ids of the probed features.
        rate_f: firing rates `[M]`.
        mean_f: mean activations `[M]`.
        config: number of controls and seed.

    Returns:
        The ids of the controls of each feature: `config.controls`, or fewer if too few other
        features are active.
    """
    active = np.flatnonzero(rate_f > 0)
    candidates = np.setdiff1d(active, features)
    position_f2 = np.log(np.maximum(np.stack([rate_f, np.abs(mean_f)], axis=1), 1e-9))
    controls = {}
    for feature in features:
        distance = np.linalg.norm(position_f2[candidates] - position_f2[feature], axis=1)
        pool_size = CANDIDATES_PER_CONTROL * config.controls
        nearest = candidates[np.argsort(distance, kind="stable")[:pool_size]]
        rng = np.random.default_rng([config.seed, feature])
        controls[feature] = rng.permutation(nearest)[: config.controls].tolist()
    return controls


def certify(
    config: CertificateConfig,
    effects: dict[int, np.ndarray],
    controls: dict[int, list[int]],
    cluster_n: np.ndarray,
    signed: bool,
) -> list[dict[str, Any]]:
    """Tests every probed feature and returns one certificate for each.

    Args:
        config: options of the tests.
        effects: e `[N]` of every probed feature and every control.
        controls: the controls of each probed feature.
        cluster_n: number of the prompt of each row; rows of one prompt are averaged.
        signed: test the effect as well as the excess; False if e is never negative.

    Returns:
        A row of certificates.json for each key of `controls`, in that order.
    """
    count_q = np.bincount(cluster_n)

    def by_prompt(values_n: np.ndarray) -> np.ndarray:
        return np.bincount(cluster_n, values_n) / count_q

    certificates = []
    for feature, others in controls.items():
        own_q = by_prompt(effects[feature])
        row: dict[str, Any] = {"feature": feature, "prompts": len(count_q), "controls": others}
        row["effect"] = mean_interval(own_q)
        if others:
            others_n = np.mean([np.abs(effects[i]) for i in others], axis=0)
            own_n = np.abs(effects[feature])
            excess_n = own_n - others_n
            # Equal effects differ by rounding alone, all of them perhaps in the same direction.
            excess_n[np.abs(excess_n) <= ROUNDING * own_n] = 0
            excess_q = by_prompt(excess_n)
            row["excess"] = mean_interval(excess_q)
            row["control_effects"] = [float(by_prompt(effects[i]).mean()) for i in others]
            own = by_prompt(own_n).mean() * (1 + ROUNDING)
            sizes = [by_prompt(np.abs(effects[i])).mean() for i in others]
            row["controls_above"] = sum(bool(size > own) for size in sizes)
            row["p_effect"] = sign_flip(own_q, config, two_sided=True) if signed else None
            row["p_excess"] = sign_flip(excess_q, config, two_sided=False)
            row["p"] = max(row["p_excess"], row["p_effect"] or 0.0)
        else:
            row["p"] = 1.0
        certificates.append(row)
    adjusted = holm([row["p"] for row in certificates])
    for row, p_holm in zip(certificates, adjusted, strict=True):
        row["p_holm"] = p_holm
        row["certified"] = bool(p_holm <= config.level)
        row["reason"] = _reason(row, config.level)
    return certificates


def sign_flip(values_q: np.ndarray, config: CertificateConfig, two_sided: bool) -> float:
    """Computes the p value of a mean of 0 under random signs of the values `[Q]`.

    The smallest p value is 1 / (flips + 1).
    """
    values = values_q[values_q != 0]
    if not len(values):
        return 1.0
    rng = np.random.default_rng(config.seed)
    observed = values.sum()
    tolerance = 1e-9 * np.abs(values).sum()
    extreme, remaining = 0, config.flips
    while remaining:
        rows = min(remaining, max(1, 4_000_000 // len(values)))
        sums = (rng.integers(0, 2, (rows, len(values)), dtype=np.int8) * 2.0 - 1.0) @ values
        if two_sided:
            extreme += int((np.abs(sums) >= abs(observed) - tolerance).sum())
        else:
            extreme += int((sums >= observed - tolerance).sum())
        remaining -= rows
    return (1 + extreme) / (1 + config.flips)


def _reason(row: dict[str, Any], level: float) -> str:
    """Explains in one line why a feature is certified or not."""
    if not row["controls"]:
        return "no other active feature to compare with"
    if row["certified"]:
        count, above = len(row["controls"]), row["controls_above"]
        return f"the effect exceeds the mean of {count} matched features ({above} lie above it)"
    if row["p_effect"] is not None and row["p_effect"] > level:
        return f"the effect cannot be distinguished from 0 (p = {row['p_effect']:.3g})"
    if row["p_excess"] > level:
        return f"the effect does not exceed that of matched features (p = {row['p_excess']:.3g})"
    return f"not significant after correction for the number of features (p = {row['p_holm']:.3g})"
