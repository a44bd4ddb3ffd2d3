"""Finding features: which latents tell chosen from rejected responses.

Two methods, as in the reference implementation:
    head weight               the most positive and the most negative w_i
    differential activation   s_i = (c_i − j_i) / (c_i + j_i + C),   C = mean(c + j) + 1e-9
with c and j the mean pooled latents of chosen and rejected responses. Beyond it: a threshold for
every selected feature, the quantile of z_i on the chosen responses that a penalty may start at,
with the share of responses above it on either side; and detectors and carriers (`detectors`).
"""

import dataclasses
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from sarm_jax.detectors import (
    Detectors,
    calibrated_tau,
    carried_reward,
    find_detectors,
    random_control,
)
from sarm_jax.errors import InputError
from sarm_jax.reward_model import RewardModel


@dataclasses.dataclass(frozen=True)
class IdentifyConfig:
    """`top_k` features per list; `method` is differential or head_weight."""

    top_k: int
    method: str
    tau_quantile: float
    false_alarm_budget: float
    seed: int

    def __post_init__(self) -> None:
        if self.top_k < 1:
            raise InputError(f"identify.top_k={self.top_k}: must be at least 1")
        if self.method not in ("differential", "head_weight"):
            raise InputError(
                f"identify.method={self.method!r}: expected differential or head_weight"
            )
        if self.seed < 0:
            raise InputError(f"identify.seed={self.seed}: must not be negative")
        if not 0 < self.tau_quantile < 1:
            raise InputError(f"identify.tau_quantile={self.tau_quantile}: must lie in (0, 1)")
        if not 0 <= self.false_alarm_budget < 1:
            raise InputError(
                f"identify.false_alarm_budget={self.false_alarm_budget}: must lie in [0, 1)"
            )


def differential_activation(chosen_nf: np.ndarray, rejected_nf: np.ndarray) -> np.ndarray:
    """s `[M]`, positive where a latent is more active on chosen responses."""
    c, j = chosen_nf.mean(axis=0), rejected_nf.mean(axis=0)
    return (c - j) / (c + j + (c + j).mean() + 1e-9)


def pair_latents(
    reward_model: RewardModel, pairs: Sequence[Mapping[str, str]]
) -> tuple[np.ndarray, np.ndarray]:
    """Pooled latents `[N, M]` of chosen and rejected; a response in many pairs is scored once."""
    texts = [(pair["prompt"], pair[side]) for side in ("chosen", "rejected") for pair in pairs]
    row = {text: i for i, text in enumerate(dict.fromkeys(texts))}
    _, z_nf = reward_model.score([prompt for prompt, _ in row], [response for _, response in row])
    chosen_nf, rejected_nf = np.split(z_nf[[row[text] for text in texts]], 2)
    return chosen_nf, rejected_nf


def identify(
    config: IdentifyConfig, reward_model: RewardModel, pairs: Sequence[Mapping[str, str]]
) -> tuple[dict[str, Any], dict[str, Any], dict[str, np.ndarray]]:
    """(feature_analysis, selected_features, scores of all M features) of preference pairs."""
    chosen_nf, rejected_nf = pair_latents(reward_model, pairs)
    weight_f = np.asarray(reward_model.model.score[...], np.float32)
    differential_f = differential_activation(chosen_nf, rejected_nf)
    score_f = differential_f if config.method == "differential" else weight_f
    order = np.argsort(score_f, kind="stable")
    tau_f = calibrated_tau(chosen_nf, config.tau_quantile)

    def describe(i: int) -> dict[str, float]:
        return {
            "feature": int(i),
            "score": float(score_f[i]),
            "differential": float(differential_f[i]),
            "head_weight": float(weight_f[i]),
            "mean_chosen": float(chosen_nf[:, i].mean()),
            "mean_rejected": float(rejected_nf[:, i].mean()),
            "tau": float(tau_f[i]),
            "above_tau_chosen": float((chosen_nf[:, i] > tau_f[i]).mean()),
            "above_tau_rejected": float((rejected_nf[:, i] > tau_f[i]).mean()),
        }

    def describe_together(found: Detectors) -> dict[str, Any]:
        return {
            "detection": found.detection,
            "false_alarms": found.false_alarms,
            "features": [describe(i) for i in found.features],
        }

    detectors = find_detectors(
        chosen_nf, rejected_nf, config.tau_quantile, config.false_alarm_budget, config.top_k
    )
    control = random_control(
        chosen_nf, rejected_nf, config.tau_quantile, detectors.features, config.seed
    )
    carried_f = carried_reward(chosen_nf, rejected_nf, weight_f)
    carriers = np.argsort(-carried_f, kind="stable")[: config.top_k]
    harming = [describe(i) for i in order[: config.top_k]]
    promoting = [describe(i) for i in order[::-1][: config.top_k]]
    selected = {
        "safety_promoting": [row["feature"] for row in promoting],
        "safety_harming": [row["feature"] for row in harming],
        "tau_promoting": [row["tau"] for row in promoting],
        "tau_harming": [row["tau"] for row in harming],
        "detectors": list(detectors.features),
        "tau_detectors": list(detectors.tau),
        "carriers": [int(i) for i in carriers],
        "random_control": list(control.features),
        "tau_random_control": list(control.tau),
        "method": config.method,
    }
    analysis = {
        "pairs": len(pairs),
        "options": dataclasses.asdict(config),
        "harming": harming,
        "promoting": promoting,
        "detectors": describe_together(detectors),
        "random_control": describe_together(control),
        "carriers": [describe(i) | {"carried_reward": float(carried_f[i])} for i in carriers],
    }
    scores = {
        "differential": differential_f.astype(np.float32),
        "head_weight": weight_f,
        "carried_reward": carried_f.astype(np.float32),
    }
    return analysis, selected, scores
