"""The score of a response as a sum: its features, what they leave out, and a constant.

    SARM               R = Σ_i z_i w_i
    linear reward, SAE R = Σ_i z_i (W_dec,i · w)  +  e · w  +  b_pre · w

The rows add up to the score. The error row e · w is what remains of the score without the others,
so it has the rounding as well. Of an ensemble of heads the weights are those of the mean head; if
the score is the least one of any head, the row "ensemble" is what it is below the mean head's.
"""

from typing import Any

import numpy as np

from sarm_jax.models.conversation import PromptValue
from sarm_jax.models.linear_reward import LinearReward
from sarm_jax.models.reward_model import RewardModel


def attribution(model: RewardModel, prompt: PromptValue, response: str) -> list[dict[str, Any]]:
    """Splits the score of a response into its parts.

    Returns:
        A row {"part": "feature", "feature", "z", "weight", "reward"} for every latent that is not
        0, the largest |reward| first. For a reward model whose SAE came afterwards, the rows
        {"part": "error", "reward"} and {"part": "constant", "reward"} follow; for the least score
        of an ensemble, the row {"part": "ensemble", "reward"}.

    Raises:
        InputError: the reward model has no SAE; or as `RewardModel.score`.
    """
    weight_f = model.feature_weights()
    score_b, z_bf = model.score([prompt], [response])
    active = np.flatnonzero(z_bf[0])
    reward_a = z_bf[0][active].astype(np.float64) * weight_f[active]
    order = np.argsort(-np.abs(reward_a), kind="stable")
    rows: list[dict[str, Any]] = [
        {
            "part": "feature",
            "feature": int(active[n]),
            "z": float(z_bf[0][active[n]]),
            "weight": float(weight_f[active[n]]),
            "reward": float(reward_a[n]),
        }
        for n in order
    ]
    if isinstance(model.model, LinearReward):
        constant = model.model.constant()
        explained = sum(row["reward"] for row in rows)
        rows.append({"part": "error", "reward": float(score_b[0]) - explained - constant})
        rows.append({"part": "constant", "reward": constant})
    if not model.is_linear:
        explained = sum(row["reward"] for row in rows)
        rows.append({"part": "ensemble", "reward": float(score_b[0]) - explained})
    return rows
