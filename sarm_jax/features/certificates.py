"""Causal certificates: does changing a feature do more than changing others like it?

For every probed feature, controls are drawn at random among the active features nearest to it in
firing rate and mean activation. With e_i the effect on prompt i (the change of the margin of a
pair, of the reward, or whether best-of-N picks another candidate):
    effect      mean e_i, with an interval
    excess      mean of |e_i| − the controls' mean |e_i| on the same prompt, with an interval;
                `controls_above` counts the controls whose own mean |e_i| is larger
Both are tested by flipping the signs of whole prompts at random: the effect on both sides, the
excess on one (for best-of-N the excess alone, since e_i is never negative). Both must hold, so the
larger p counts (an intersection-union test); Holm's step-down corrects over the probed features.
"""

import dataclasses
from collections.abc import Sequence
from typing import Any

import numpy as np

from sarm_jax.io.errors import InputError
from sarm_jax.reporting.statistics import mean_interval

POOL = 5  # as many nearest features per control that is drawn


@dataclasses.dataclass(frozen=True)
class CertificateConfig:
    """`controls` per feature, `flips` of the test, the `level` after Holm's correction."""

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
    """For each feature as many others like it as there are, none of them probed itself.

    Distance: of the logarithms of firing rate and mean activation `[M]`.
    """
    active = np.flatnonzero(rate_f > 0)
    candidates = np.setdiff1d(active, features)
    place_f2 = np.log(np.maximum(np.stack([rate_f, np.abs(mean_f)], axis=1), 1e-9))
    drawn = {}
    for feature in features:
        distance = np.linalg.norm(place_f2[candidates] - place_f2[feature], axis=1)
        near = candidates[np.argsort(distance, kind="stable")[: POOL * config.controls]]
        rng = np.random.default_rng([config.seed, feature])
        drawn[feature] = rng.permutation(near)[: config.controls].tolist()
    return drawn


def certify(
    config: CertificateConfig,
    effects: dict[int, np.ndarray],
    controls: dict[int, list[int]],
    cluster_n: np.ndarray,
    signed: bool,
) -> list[dict[str, Any]]:
    """One certificate per feature of `controls`.

    `effects` has e `[N]` of features and controls; rows of one `cluster_n` (a prompt) are averaged.
    """
    count_q = np.bincount(cluster_n)

    def by_prompt(values_n: np.ndarray) -> np.ndarray:
        return np.bincount(cluster_n, values_n) / count_q

    found = []
    for feature, others in controls.items():
        own_q = by_prompt(effects[feature])
        row: dict[str, Any] = {"feature": feature, "prompts": len(count_q), "controls": others}
        row["effect"] = mean_interval(own_q)
        if others:
            others_n = np.mean([np.abs(effects[i]) for i in others], axis=0)
            excess_q = by_prompt(np.abs(effects[feature]) - others_n)
            row["excess"] = mean_interval(excess_q)
            row["control_effects"] = [float(by_prompt(effects[i]).mean()) for i in others]
            own = by_prompt(np.abs(effects[feature])).mean()
            sizes = [by_prompt(np.abs(effects[i])).mean() for i in others]
            row["controls_above"] = sum(bool(size > own) for size in sizes)
            row["p_effect"] = sign_flip(own_q, config, two_sided=True) if signed else None
            row["p_excess"] = sign_flip(excess_q, config, two_sided=False)
            row["p"] = max(row["p_excess"], row["p_effect"] or 0.0)
        else:
            row["p"] = 1.0
        found.append(row)
    for row, p in zip(found, holm([row["p"] for row in found]), strict=True):
        row["p_holm"] = p
        row["certified"] = bool(p <= config.level)
        row["reason"] = _reason(row, config.level)
    return found


def sign_flip(values_q: np.ndarray, config: CertificateConfig, two_sided: bool) -> float:
    """p of a mean of 0, every value being as likely with either sign; never below 1/(flips+1)."""
    values = values_q[values_q != 0]
    if not len(values):
        return 1.0
    rng = np.random.default_rng(config.seed)
    observed = values.sum()
    tiny = 1e-9 * np.abs(values).sum()
    extreme, left = 0, config.flips
    while left:
        rows = min(left, max(1, 4_000_000 // len(values)))
        sums = (rng.integers(0, 2, (rows, len(values)), dtype=np.int8) * 2.0 - 1.0) @ values
        if two_sided:
            extreme += int((np.abs(sums) >= abs(observed) - tiny).sum())
        else:
            extreme += int((sums >= observed - tiny).sum())
        left -= rows
    return (1 + extreme) / (1 + config.flips)


def holm(p_values: Sequence[float]) -> list[float]:
    """Holm's (1979) adjusted p values, in the order given."""
    order = np.argsort(p_values, kind="stable")
    factors = len(p_values) - np.arange(len(p_values))
    stepped = np.minimum(1, np.maximum.accumulate(factors * np.asarray(p_values)[order]))
    adjusted = np.empty(len(p_values))
    adjusted[order] = stepped
    return adjusted.tolist()


def _reason(row: dict[str, Any], level: float) -> str:
    if not row["controls"]:
        return "no other active feature to compare with"
    if row["certified"]:
        count, above = len(row["controls"]), row["controls_above"]
        return f"an effect, larger than the mean one of {count} matched features ({above} above it)"
    if row["p_effect"] is not None and row["p_effect"] > level:
        return f"no effect can be told from 0 (p = {row['p_effect']:.3g})"
    if row["p_excess"] > level:
        return f"not more than matched features do (p = {row['p_excess']:.3g})"
    return f"not after correction for the number of features (p = {row['p_holm']:.3g})"
