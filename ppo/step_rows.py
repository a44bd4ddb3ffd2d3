"""The rows that a PPO step adds to metrics.csv and samples.jsonl, from its rollout and reward."""

import time
from collections.abc import Sequence
from typing import Any

import numpy as np

from ppo.rollout import Rollout
from sarm_jax.models.conversation import to_json
from sarm_jax.rewards.compound import RewardTerms
from sarm_jax.rewards.reward_config import RewardConfig
from sarm_jax.rewards.scoring import Scored


def step_row(
    step: int,
    *,
    clock: Sequence[float],
    rollout: Rollout,
    terms: RewardTerms,
    scored: Scored,
    reward_b: np.ndarray,
    reward: RewardConfig,
) -> dict[str, float]:
    """Returns the metrics of rollout and reward.

    Args:
        step: number of the step.
        clock: times between the phases, in seconds, with those of start and end.
        rollout: the responses.
        terms: terms of R_total.
        scored: what the reward model made of the responses.
        reward_b: the reward that is learned from.
        reward: options of the reward, for the penalised features.
    """
    lengths_b = rollout.lengths_b
    row: dict[str, Any] = {
        "step": step,
        "timestamp": time.time(),
        "total_reward": terms.total_b.mean(),
        "rm_score": terms.score_b.mean(),
        "indicator_penalty": terms.penalty_bn.sum(axis=1).mean(),
        "kl_penalty": terms.kl_penalty_b.mean(),
        "response_length_mean": lengths_b.mean(),
        "response_length_std": lengths_b.std(),
        "eos_fraction": rollout.ended_b.mean(),
        "reward_mean": reward_b.mean(),
        "reward_std": reward_b.std(),
        "reward_min": reward_b.min(),
        "reward_max": reward_b.max(),
        "distinct_responses": len(set(rollout.responses)) / len(set(rollout.prompts)),
        "time_rollout": clock[1] - clock[0],
        "time_score": clock[2] - clock[1],
        "time_update": clock[3] - clock[2],
        "tokens_per_second": lengths_b.sum() / (clock[3] - clock[0]),
    }
    for column, feature in enumerate(reward.penalize_features):
        z_b = scored.z_bn[:, column]
        row[f"feat_{feature}_activation"] = z_b.mean()
        row[f"feat_{feature}_above_tau"] = (z_b > reward.tau_values[column]).mean()
    row |= terms.further_means | scored.states.means
    return {name: float(value) for name, value in row.items()} | {"step": step}


def sample_rows(
    step: int, rollout: Rollout, terms: RewardTerms, *, reward: RewardConfig, count: int
) -> list[dict[str, Any]]:
    """Returns the rows of samples.jsonl for the first `count` responses of the batch."""
    return [
        {
            "step": step,
            "prompt": to_json(rollout.prompts[b]),
            "response": rollout.responses[b],
            "rm_score": float(terms.score_b[b]),
            "penalties": {
                str(i): float(p)
                for i, p in zip(reward.penalize_features, terms.penalty_bn[b], strict=True)
            },
            "kl_penalty": float(terms.kl_penalty_b[b]),
            **terms.further_of(b),
            "total_reward": float(terms.total_b[b]),
        }
        for b in range(min(count, len(rollout.prompts)))
        if np.isfinite(terms.total_b[b])  # JSON has no NaN; such a step is dumped
    ]
