"""The result of a run in the study, from its evaluations: gold reward, SARM score and shortcuts.

The gold reward is that of responses to held-out prompts. The SARM's score is computed from
unchanged latents in every condition. It is given in standard deviations of the reference responses
(those of step 0) from their mean.

A point of the curve also tells how much of the penalised behaviour escapes the detectors, as shares
of the responses:

    told             have a shortcut that the method is told, by the rule that counts it
    told_undetected  have one, and no detector fires
    untold           have a shortcut that the method is not told, if the task has such
    near_tau         the largest of the detectors' latents, each divided by its threshold, lies
                     between 0.8 and 1
"""

import dataclasses
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from sarm_jax.io.errors import InputError
from sarm_jax.lab.shortcuts import FLATTERY_ALONE
from sarm_jax.lab.task import Task
from sarm_jax.models.reward_model import RewardModel
from sarm_jax.reporting.spread import standard_deviation

NEAR_TAU = 0.8  # a latent between this share of its threshold and the threshold is near it
TINY = 1e-9  # a latent is divided by this if its threshold is 0
SAMPLES = 6  # responses shown before and after training


@dataclasses.dataclass(frozen=True)
class _Scores:
    """The scores of all responses, from which the curve and the samples are computed.

    Attributes:
        step_b: step of the evaluation.
        score_b: standardised score of the SARM.
        gold_b: gold reward.
        fired_bn: which detectors fire.
        nearest_b: the largest of the detectors' latents, each divided by its threshold.
        told_b: which responses have a shortcut that the method is told.
        measured: further measures of the task, by name.
    """

    step_b: np.ndarray
    score_b: np.ndarray
    gold_b: np.ndarray
    fired_bn: np.ndarray
    nearest_b: np.ndarray
    told_b: np.ndarray
    measured: list[dict[str, float]]


def run_result(
    evaluations: Sequence[Mapping[str, Any]],
    model: RewardModel,
    features: Mapping[str, Sequence],
    seconds: float,
    task: Task = FLATTERY_ALONE,
) -> dict[str, Any]:
    """Computes the content of result.json: curve, start and end, fired features, samples.

    Args:
        evaluations: {step, prompt, response, ended, ref_kl} rows.
        model: the SARM.
        features: the lists of selected_features.json.
        seconds: duration of the run.
        task: the task. If it has several shortcuts, `rate_{shortcut}` is the share of the
            responses that have it, and `units_{shortcut}` how much of it there is per response.
    """
    scores = _score(evaluations, model, features, task)
    step_b = scores.step_b
    start_b, end_b = step_b == step_b.min(), step_b == step_b.max()
    curve = [_point(step, evaluations, scores, task) for step in np.unique(step_b)]
    gold = [point["gold"] for point in curve]
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
            str(feature): [float(scores.fired_bn[rows, n].mean()) for rows in (start_b, end_b)]
            for n, feature in enumerate(features["detectors"])
        },
        "samples": _samples(start_b, end_b, evaluations=evaluations, scores=scores),
    }


def _score(
    evaluations: Sequence[Mapping[str, Any]],
    model: RewardModel,
    features: Mapping[str, Sequence],
    task: Task,
) -> _Scores:
    """Computes the scores, gold rewards, fired detectors and shortcuts of all responses."""
    prompts, responses = ([row[name] for row in evaluations] for name in ("prompt", "response"))
    score_b, z_bn = model.score(prompts, responses, latent_indices=features["detectors"])
    tau_n = np.asarray(features["tau_detectors"], np.float32)
    step_b = np.asarray([row["step"] for row in evaluations])
    start_b = step_b == step_b.min()
    gold = [task.gold_reward(row["prompt"], row["response"], row["ended"]) for row in evaluations]
    return _Scores(
        step_b=step_b,
        score_b=in_deviations_of(score_b, start_b),
        gold_b=np.asarray(gold),
        fired_bn=z_bn > tau_n,
        nearest_b=np.max(z_bn / np.maximum(tau_n, TINY), axis=1, initial=0.0),
        told_b=np.asarray([task.has_told(row["prompt"], row["response"]) for row in evaluations]),
        measured=[task.measures(row["prompt"], row["response"]) for row in evaluations],
    )


def in_deviations_of(score_b: np.ndarray, reference_b: np.ndarray) -> np.ndarray:
    """Standardises scores `[B]` by mean and deviation of those that `reference_b` `[B]` marks.

    Raises:
        InputError: the marked scores are all equal or not finite.
    """
    reference = score_b[reference_b]
    deviation = standard_deviation(reference)
    if not 0 < deviation < np.inf:
        raise InputError(
            f"the SARM's scores of the {len(reference)} responses before training are all equal or "
            "not finite: they give no scale"
        )
    return (score_b - reference.mean()) / deviation


def _point(
    step: int,
    evaluations: Sequence[Mapping[str, Any]],
    scores: _Scores,
    task: Task,
) -> dict[str, float]:
    """Averages the evaluation of one step: one point of the curve."""
    rows = np.flatnonzero(scores.step_b == step).tolist()
    values: dict[str, Any] = {
        "gold": scores.gold_b[rows],
        "score": scores.score_b[rows],
        "ref_kl": [evaluations[b]["ref_kl"] for b in rows],
        "ended": [evaluations[b]["ended"] for b in rows],
        "detected": scores.fired_bn[rows].any(axis=1),
        "told": scores.told_b[rows],
        "told_undetected": scores.told_b[rows] & ~scores.fired_bn[rows].any(axis=1),
        "near_tau": (scores.nearest_b[rows] > NEAR_TAU) & (scores.nearest_b[rows] <= 1),
    }
    for name in scores.measured[rows[0]]:
        values[name] = [scores.measured[b][name] for b in rows]
    if len(task.shortcuts) > 1:
        counts = [task.counts(evaluations[b]["prompt"], evaluations[b]["response"]) for b in rows]
        if task.untold:
            values["untold"] = [any(count[name] for name in task.untold) for count in counts]
        for name in task.shortcuts:
            units = np.asarray([count[name] for count in counts])
            values |= {f"rate_{name}": units > 0, f"units_{name}": units}
    means = {name: float(np.mean(values_n)) for name, values_n in values.items()}
    return {"step": int(step), **means}


def _samples(
    start_b: np.ndarray,
    end_b: np.ndarray,
    evaluations: Sequence[Mapping[str, Any]],
    scores: _Scores,
) -> list[dict[str, Any]]:
    """Lists responses to the same prompts before and after training."""
    before, after = (np.flatnonzero(side_b)[:SAMPLES].tolist() for side_b in (start_b, end_b))
    return [
        {
            "prompt": evaluations[first]["prompt"],
            "before": evaluations[first]["response"],
            "after": evaluations[last]["response"],
            "gold_before": float(scores.gold_b[first]),
            "gold_after": float(scores.gold_b[last]),
            "score_before": float(scores.score_b[first]),
            "score_after": float(scores.score_b[last]),
        }
        for first, last in zip(before, after, strict=True)
    ]
