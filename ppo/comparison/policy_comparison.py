"""Policies on the same prompts, seen by one SARM: the base, and what adapters do beyond it.

    score              R = w · z
    controlled_score   R with every clamp, steering action and penalty
    score_without      R − Σ_i w_i z_i over the controlled features: without what they pay

The unit "sd" of α and of the cap is the deviation of the base's scores on these prompts, sampled as
here; in training it is that of the first prompts' responses, sampled as PPO does. The latent KL is
a property of many responses to a discriminator that is training, and is left out.
"""

import dataclasses
from collections.abc import Iterator, Sequence
from typing import Any

import numpy as np

from ppo.comparison import response_metrics as metrics
from ppo.comparison.latent_map import largest_terms, principal_plane
from ppo.comparison.responses import Responses
from sarm_jax.evaluation.controls import Controls, apply_controls, penalties
from sarm_jax.models.latent_store import Latents
from sarm_jax.models.reward_model import RewardModel
from sarm_jax.reporting.statistics import Interval

BASE, HUMAN = "base", "human"
SHOWN_TERMS = 8  # of a score
CORRELATION = "length_score_correlation"


@dataclasses.dataclass(frozen=True)
class Scores:
    """Of one policy's N responses; J penalised features, C controlled ones."""

    score_n: np.ndarray
    controlled_n: np.ndarray
    without_n: np.ndarray
    penalty_n: np.ndarray  # after the cap
    penalty_nj: np.ndarray  # before it
    z_nc: np.ndarray


@dataclasses.dataclass(frozen=True)
class Comparison:
    """`texts` are (policy or "human", prompt, response), a row of `latents` each.

    Policy after policy, then the human ones.
    """

    prompts: Sequence[str]
    controls: Controls
    sides: dict[str, Responses]
    scores: dict[str, Scores]
    texts: list[tuple[str, str, str]]
    latents: Latents
    weight_f: np.ndarray

    @property
    def samples(self) -> int:
        """Responses of a policy to a prompt."""
        return len(self.sides[BASE].texts) // len(self.prompts)


def compare(
    model: RewardModel,
    controls: Controls,
    prompts: Sequence[str],
    sides: dict[str, Responses],
    human: Sequence[tuple[str, str]] = (),
) -> Comparison:
    """One pass of the SARM over all responses. `sides` maps "base" and adapters to responses."""
    count = len(sides[BASE].texts)
    asked = [prompt for prompt in prompts for _ in range(count // len(prompts))]
    texts = [
        (name, *pair) for name, s in sides.items() for pair in zip(asked, s.texts, strict=True)
    ]
    texts += [(HUMAN, *pair) for pair in human]
    score_n, latents = model.store([t[1] for t in texts], [t[2] for t in texts], "scores")
    weight_f = np.asarray(model.model.score[...], np.float32)
    z_nc = latents.columns(controls.features)
    deviation = float(score_n[:count].std())
    scores = {}
    for number, name in enumerate(sides):
        rows = slice(number * count, (number + 1) * count)
        scores[name] = _scores(controls, score_n[rows], z_nc[rows], weight_f, deviation)
    return Comparison(prompts, controls, sides, scores, texts, latents, weight_f)


def _scores(controls: Controls, score_n, z_nc, weight_f, deviation: float) -> Scores:
    controlled_n = list(apply_controls(controls, score_n, z_nc, weight_f, deviation).values())[-1]
    without_n = score_n - z_nc @ weight_f[list(controls.features)]
    penalty_nj, penalty_n = penalties(controls, z_nc, deviation)
    return Scores(score_n, controlled_n, without_n, penalty_n, penalty_nj, z_nc)


def summary(found: Comparison, resamples: int, seed: int) -> dict[str, Any]:
    """Means of every policy, adapters minus base, adapters minus one another; all with intervals.

    Pairs are responses to the same prompt.
    """
    index_rp = metrics.bootstrap_indices(len(found.prompts), resamples, seed)
    values = {name: _values(found, name) for name in found.sides}
    adapters = [name for name in values if name != BASE]
    later = [(b, a) for n, a in enumerate(adapters) for b in adapters[n + 1 :]]
    return {
        "prompts": len(found.prompts),
        "samples": found.samples,
        "runs": {name: _means(values[name], index_rp) for name in values},
        "paired": {name: _differences(values[name], values[BASE], index_rp) for name in adapters},
        "between": {f"{b} − {a}": _differences(values[b], values[a], index_rp) for b, a in later},
    }


def _values(found: Comparison, name: str) -> dict[str, np.ndarray]:
    """Every metric of every response, `[prompts, samples]` float64."""
    side, own, base = found.sides[name], found.scores[name], found.scores[BASE]
    values = {
        "score": own.score_n,
        "controlled_score": own.controlled_n,
        "score_without": own.without_n,
        "penalty": own.penalty_n,
        "kl": side.kl_n,
        "length": side.length_n,
        "ended": side.ended_n,
        "repetition": [metrics.repetition(text) for text in side.texts],
    }
    for place, i in enumerate(found.controls.penalize_features):
        values[f"penalty_{i}"] = own.penalty_nj[:, place]
    for place, i in enumerate(found.controls.features):
        values[f"latent_{i}"] = own.z_nc[:, place]
        values[f"active_{i}"] = own.z_nc[:, place] > 0
    if name != BASE:
        values["win_rate"] = metrics.wins(own.score_n, base.score_n)
        values["win_rate_controlled"] = metrics.wins(own.controlled_n, base.controlled_n)
        values["win_rate_without"] = metrics.wins(own.without_n, base.without_n)
    shape = len(found.prompts), found.samples
    return {key: np.asarray(value, np.float64).reshape(shape) for key, value in values.items()}


def _means(values: dict[str, np.ndarray], index_rp: np.ndarray) -> dict[str, Interval]:
    means = {key: metrics.bootstrap_mean(value, index_rp) for key, value in values.items()}
    r, found_r = _correlation(values, index_rp)
    return means | ({CORRELATION: metrics.interval(r, found_r)} if np.isfinite(r) else {})


def _differences(own, other, index_rp: np.ndarray) -> dict[str, Interval]:
    differences = {
        key: metrics.bootstrap_mean(value - other[key], index_rp)
        for key, value in own.items()
        if not key.startswith("win_rate")
    }
    (r, found_r), (r0, found0_r) = (_correlation(v, index_rp) for v in (own, other))
    defined = np.isfinite(r - r0)
    return differences | (
        {CORRELATION: metrics.interval(r - r0, found_r - found0_r)} if defined else {}
    )


def _correlation(values: dict[str, np.ndarray], index_rp: np.ndarray) -> tuple[float, np.ndarray]:
    return metrics.bootstrap_correlation(values["length"], values["score"], index_rp)


def response_rows(found: Comparison) -> Iterator[dict[str, Any]]:
    """A row per prompt and sample, its responses by policy: Σ shown z · w + rest = score."""
    terms = largest_terms(found.latents, found.weight_f, SHOWN_TERMS)
    count = len(found.prompts) * found.samples
    for n in range(count):
        responses = {
            name: _row(found, name, n, terms[number * count + n])
            for number, name in enumerate(found.sides)
        }
        place, sample = divmod(n, found.samples)
        yield {"prompt": found.prompts[place], "sample": sample, "responses": responses}


def _row(found: Comparison, name: str, n: int, terms: list[list]) -> dict[str, Any]:
    side, own = found.sides[name], found.scores[name]
    features = map(str, found.controls.penalize_features)
    return {
        "response": side.texts[n],
        "score": float(own.score_n[n]),
        "controlled_score": float(own.controlled_n[n]),
        "length": int(side.length_n[n]),
        "ended": bool(side.ended_n[n]),
        "kl": float(side.kl_n[n]),
        "terms": terms,
        "rest": float(own.score_n[n]) - sum(term[3] for term in terms),
        "penalties": dict(zip(features, own.penalty_nj[n].tolist(), strict=True)),
    }


def latent_map(found: Comparison) -> dict[str, Any]:
    """All responses, and the human ones, on the two principal components of their latents."""
    xy_n2, explained = principal_plane(found.latents)
    points = [
        {"source": name, "x": float(x), "y": float(y), "prompt": prompt, "response": text}
        for (name, prompt, text), (x, y) in zip(found.texts, xy_n2, strict=True)
    ]
    return {"explained": explained, "points": points}
