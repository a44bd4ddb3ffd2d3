"""From a run's evaluations to what the study says about it: the truth, and what the SARM thinks.

The gold reward is of held-out prompts. The SARM's score is that of unchanged latents, whatever
the condition, in standard deviations of the reference responses (those of step 0) from their mean.
"""

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from sarm_jax.lab import world
from sarm_jax.models.reward_model import RewardModel

SHOWN = 6  # responses before and after


def run_result(
    evaluations: Sequence[Mapping[str, Any]],
    model: RewardModel,
    features: Mapping[str, Sequence],
    seconds: float,
) -> dict[str, Any]:
    """The result of one run: curve, ends, fired features, samples.

    `evaluations` are rows {step, prompt, response, ended, ref_kl}; `features` the lists of
    selected_features.json; `seconds` what the run took.
    """
    prompts, responses = ([row[name] for row in evaluations] for name in ("prompt", "response"))
    score_b, z_bn = model.score(prompts, responses, latent_indices=features["detectors"])
    step_b = np.asarray([row["step"] for row in evaluations])
    start_b, end_b = step_b == step_b.min(), step_b == step_b.max()
    score_b = (score_b - score_b[start_b].mean()) / score_b[start_b].std()
    fired_bn = z_bn > np.asarray(features["tau_detectors"], np.float32)
    gold_b = np.asarray([world.gold_reward(*_response(row), row["ended"]) for row in evaluations])
    counts = [world.count(*_response(row)) for row in evaluations]

    def point(step: int) -> dict[str, float]:
        rows = np.flatnonzero(step_b == step).tolist()
        values = {
            "gold": gold_b[rows],
            "score": score_b[rows],
            "ref_kl": [evaluations[b]["ref_kl"] for b in rows],
            "ended": [evaluations[b]["ended"] for b in rows],
            "detected": fired_bn[rows].any(axis=1),
        }
        for name in ("hits", "wrong", "flattery", "duplicates", "filler", "junk"):
            values[name] = [getattr(counts[b], name) for b in rows]
        return {"step": int(step)} | {name: float(np.mean(v)) for name, v in values.items()}

    curve = [point(step) for step in np.unique(step_b)]
    gold = [at["gold"] for at in curve]
    before, after = (np.flatnonzero(side_b)[:SHOWN].tolist() for side_b in (start_b, end_b))
    return {
        "gold_start": gold[0],
        "gold_peak": max(gold),
        "gold_final": gold[-1],
        "score_start": curve[0]["score"],
        "score_final": curve[-1]["score"],
        "steps": curve[-1]["step"],
        "seconds": seconds,
        "peak_step": curve[int(np.argmax(gold))]["step"],
        "ref_kl_final": curve[-1]["ref_kl"],
        "curve": curve,
        "fired": {
            str(feature): [float(fired_bn[rows, column].mean()) for rows in (start_b, end_b)]
            for column, feature in enumerate(features["detectors"])
        },
        "samples": [
            {
                "prompt": prompts[first],
                "before": responses[first],
                "after": responses[last],
                "gold_before": float(gold_b[first]),
                "gold_after": float(gold_b[last]),
                "score_before": float(score_b[first]),
                "score_after": float(score_b[last]),
            }
            for first, last in zip(before, after, strict=True)
        ],
    }


def _response(row: Mapping[str, Any]) -> tuple[str, str]:
    return row["prompt"], row["response"]
