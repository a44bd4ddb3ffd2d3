"""Comparison of policies on the same prompts by one SARM: the base, and trained adapters.

    score              R = w · z
    controlled_score   R with every clamp, steering action and penalty
    score_without      R − Σ_i w_i z_i over the controlled features: the score without their part;
                       of the least score of an ensemble, R with these features set to 0

The unit "sd" of α and of the cap is the standard deviation of the base's scores on these prompts,
sampled with the same options. In training it is the standard deviation for the first prompts,
sampled as in PPO. The latent KL is a property of many responses and of a trained discriminator; it
is left out.
"""

import dataclasses
from collections.abc import Iterator, Sequence
from typing import Any

import numpy as np

from ppo.comparison import response_metrics as metrics
from ppo.comparison.latent_map import largest_terms, principal_plane, sum_of_terms
from ppo.comparison.responses import Responses
from sarm_jax.evaluation.controls import Controls, apply_controls, penalties, rescored
from sarm_jax.models.conversation import Prompt, to_json
from sarm_jax.models.latent_store import Latents
from sarm_jax.models.linear_reward import LinearReward
from sarm_jax.models.reward_model import RewardModel
from sarm_jax.models.sarm import intervention
from sarm_jax.reporting.spread import standard_deviation
from sarm_jax.reporting.statistics import Interval

BASE, HUMAN = "base", "human"
SHOWN_TERMS = 8  # largest terms of a score that are written out
CORRELATION = "length_score_correlation"


@dataclasses.dataclass(frozen=True)
class Scores:
    """Scores of one policy's N responses, with J penalised and C controlled features.

    `penalty_nj` are the penalties before the cap, `penalty_n` their sum after it.
    """

    score_n: np.ndarray
    controlled_n: np.ndarray
    without_n: np.ndarray
    penalty_n: np.ndarray
    penalty_nj: np.ndarray
    z_nc: np.ndarray


@dataclasses.dataclass(frozen=True)
class Comparison:
    """Responses of all policies to the same prompts, with their scores and latents.

    `responses` and `scores` are by policy name. `texts` holds (policy or "human", prompt, response)
    for every response, policy after policy and the human ones last; `latents` has a row for each.
    `constant` is what the SAE's bias adds to every score; None if the features are the whole score,
    as in a SARM.
    """

    prompts: Sequence[Prompt]
    controls: Controls
    responses: dict[str, Responses]
    scores: dict[str, Scores]
    texts: list[tuple[str, Prompt, str]]
    latents: Latents
    weight_f: np.ndarray
    constant: float | None = None

    @property
    def samples(self) -> int:
        """Number of responses of a policy to each prompt."""
        return len(self.responses[BASE].texts) // len(self.prompts)


def compare(
    model: RewardModel,
    controls: Controls,
    *,
    prompts: Sequence[Prompt],
    responses: dict[str, Responses],
    human: Sequence[tuple[Prompt, str]] = (),
) -> Comparison:
    """Scores all responses in one pass of the SARM.

    Args:
        model: the reward model.
        controls: its controls.
        prompts: the prompts that every policy responded to.
        responses: responses by policy name; "base" is one of them.
        human: (prompt, response) pairs by people, for the latent map.
    """
    count = len(responses[BASE].texts)
    repeated = [prompt for prompt in prompts for _ in range(count // len(prompts))]
    texts: list[tuple[str, Prompt, str]] = [
        (name, prompt, text)
        for name, own in responses.items()
        for prompt, text in zip(repeated, own.texts, strict=True)
    ]
    texts += [(HUMAN, prompt, text) for prompt, text in human]
    all_prompts, all_responses = [prompt for _, prompt, _ in texts], [text for *_, text in texts]
    score_n, latents = model.store(all_prompts, all_responses, "scores")
    weight_f = model.feature_weights()
    z_nc = latents.columns(controls.features)
    score_std = standard_deviation(score_n[:count])
    controlled_n = rescored(model, all_prompts, all_responses, controls.intervention)
    without = intervention(model.latent_size, set_to=dict.fromkeys(controls.features, 0.0))
    without_n = None
    if controls.features:
        without_n = rescored(model, all_prompts, all_responses, without)
    scores = {}
    for number, name in enumerate(responses):
        rows = slice(number * count, (number + 1) * count)
        scores[name] = _scores(
            controls,
            score_n=score_n[rows],
            z_nc=z_nc[rows],
            weight_f=weight_f,
            score_std=score_std,
            controlled_n=None if controlled_n is None else controlled_n[rows],
            without_n=None if without_n is None else without_n[rows],
        )
    return Comparison(
        prompts=prompts,
        controls=controls,
        responses=responses,
        scores=scores,
        texts=texts,
        latents=latents,
        weight_f=weight_f,
        constant=model.model.constant() if isinstance(model.model, LinearReward) else None,
    )


def _scores(
    controls: Controls,
    *,
    score_n: np.ndarray,
    z_nc: np.ndarray,
    weight_f: np.ndarray,
    score_std: float,
    controlled_n: np.ndarray | None,
    without_n: np.ndarray | None,
) -> Scores:
    """Returns the scores of a policy; the last two arguments are given if they were `rescored`."""
    variants = apply_controls(
        controls,
        plain_b=score_n,
        z_bn=z_nc,
        weight_f=weight_f,
        score_std=score_std,
        controlled_b=controlled_n,
    )
    if without_n is None:
        without_n = score_n - z_nc @ weight_f[list(controls.features)]
    penalty_nj, penalty_n = penalties(controls, z_nc, score_std)
    return Scores(
        score_n=score_n,
        controlled_n=list(variants.values())[-1],
        without_n=without_n,
        penalty_n=penalty_n,
        penalty_nj=penalty_nj,
        z_nc=z_nc,
    )


def summary(comparison: Comparison, resamples: int, seed: int) -> dict[str, Any]:
    """Summarises a comparison, with bootstrap intervals over prompts.

    Returns:
        The content of policy.json: means of every policy (`runs`), adapters minus base (`paired`)
        and adapters minus each other (`between`); differences are paired by prompt.
    """
    index_rp = metrics.bootstrap_indices(len(comparison.prompts), resamples, seed)
    values = {name: _values(comparison, name) for name in comparison.responses}
    adapters = [name for name in values if name != BASE]
    pairs = [(b, a) for n, a in enumerate(adapters) for b in adapters[n + 1 :]]
    return {
        "prompts": len(comparison.prompts),
        "samples": comparison.samples,
        "runs": {name: _means(values[name], index_rp) for name in values},
        "paired": {name: _differences(values[name], values[BASE], index_rp) for name in adapters},
        "between": {f"{b} − {a}": _differences(values[b], values[a], index_rp) for b, a in pairs},
    }


def _values(comparison: Comparison, name: str) -> dict[str, np.ndarray]:
    """Returns every metric of every response of a policy, float64 `[prompts, samples]`."""
    responses = comparison.responses[name]
    own, base = comparison.scores[name], comparison.scores[BASE]
    values = {
        "score": own.score_n,
        "controlled_score": own.controlled_n,
        "score_without": own.without_n,
        "penalty": own.penalty_n,
        "kl": responses.kl_n,
        "length": responses.length_n,
        "ended": responses.ended_n,
        "repetition": [metrics.repetition(text) for text in responses.texts],
    }
    for column, i in enumerate(comparison.controls.penalize_features):
        values[f"penalty_{i}"] = own.penalty_nj[:, column]
    for column, i in enumerate(comparison.controls.features):
        values[f"latent_{i}"] = own.z_nc[:, column]
        values[f"active_{i}"] = own.z_nc[:, column] > 0
    if name != BASE:
        values["win_rate"] = metrics.wins(own.score_n, base.score_n)
        values["win_rate_controlled"] = metrics.wins(own.controlled_n, base.controlled_n)
        values["win_rate_without"] = metrics.wins(own.without_n, base.without_n)
    shape = len(comparison.prompts), comparison.samples
    return {key: np.asarray(value, np.float64).reshape(shape) for key, value in values.items()}


def _means(values: dict[str, np.ndarray], index_rp: np.ndarray) -> dict[str, Interval]:
    means = {key: metrics.bootstrap_mean(value, index_rp) for key, value in values.items()}
    r, sample_r = _correlation(values, index_rp)
    return means | ({CORRELATION: metrics.interval(r, sample_r)} if np.isfinite(r) else {})


def _differences(
    own: dict[str, np.ndarray], other: dict[str, np.ndarray], index_rp: np.ndarray
) -> dict[str, Interval]:
    differences = {
        key: metrics.bootstrap_mean(value - other[key], index_rp)
        for key, value in own.items()
        if not key.startswith("win_rate")
    }
    own_r, own_sample_r = _correlation(own, index_rp)
    other_r, other_sample_r = _correlation(other, index_rp)
    if np.isfinite(own_r - other_r):
        differences[CORRELATION] = metrics.interval(own_r - other_r, own_sample_r - other_sample_r)
    return differences


def _correlation(values: dict[str, np.ndarray], index_rp: np.ndarray) -> tuple[float, np.ndarray]:
    return metrics.bootstrap_correlation(values["length"], values["score"], index_rp)


def response_rows(comparison: Comparison) -> Iterator[dict[str, Any]]:
    """Yields the rows of responses.jsonl: one per prompt and sample, with responses by policy.

    The terms z · w that are written out and `rest` add up to the score, together with the parts
    that are outside the features, if there are any: the error term of the SAE and its constant. The
    terms of an ensemble are those of the mean head; `rest` then also holds the difference between
    the least score and the score of the mean head.
    """
    terms = largest_terms(comparison.latents, comparison.weight_f, SHOWN_TERMS)
    explained_n = None
    if comparison.constant is not None:
        explained_n = sum_of_terms(comparison.latents, comparison.weight_f) + comparison.constant
    count = len(comparison.prompts) * comparison.samples
    for n in range(count):
        responses = {
            name: _row(
                comparison,
                name,
                n=n,
                terms=terms[number * count + n],
                explained=None if explained_n is None else float(explained_n[number * count + n]),
            )
            for number, name in enumerate(comparison.responses)
        }
        prompt, sample = divmod(n, comparison.samples)
        yield {
            "prompt": to_json(comparison.prompts[prompt]),
            "sample": sample,
            "responses": responses,
        }


def _row(
    comparison: Comparison, name: str, *, n: int, terms: list[list], explained: float | None
) -> dict[str, Any]:
    """Returns response number `n` of a policy, with its explanation.

    `explained` is the score without the error term, None if there is no such term.
    """
    responses, own = comparison.responses[name], comparison.scores[name]
    score = float(own.score_n[n])
    outside: dict[str, float] = {}
    if explained is not None and comparison.constant is not None:
        outside = {"error": score - explained, "constant": comparison.constant}
    features = map(str, comparison.controls.penalize_features)
    return {
        "response": responses.texts[n],
        "score": score,
        "controlled_score": float(own.controlled_n[n]),
        "length": int(responses.length_n[n]),
        "ended": bool(responses.ended_n[n]),
        "kl": float(responses.kl_n[n]),
        "terms": terms,
        "rest": score - sum(term[3] for term in terms) - sum(outside.values()),
        **({"outside": outside} if outside else {}),
        "penalties": dict(zip(features, own.penalty_nj[n].tolist(), strict=True)),
    }


def latent_map(comparison: Comparison) -> dict[str, Any]:
    """Returns the content of latent_map.json.

    Every response, the human ones included, is a point on the two principal components of all
    latents.
    """
    xy_n2, explained = principal_plane(comparison.latents)
    points = [
        {
            "source": name,
            "x": float(x),
            "y": float(y),
            "prompt": to_json(prompt),
            "response": text,
        }
        for (name, prompt, text), (x, y) in zip(comparison.texts, xy_n2, strict=True)
    ]
    return {"explained": explained, "points": points}
