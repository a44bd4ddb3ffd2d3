"""Identification of features: which latents tell chosen from rejected responses.

Two methods, as in the reference implementation:
    head weight               the most positive and the most negative w_i
    differential activation   s_i = (c_i − j_i) / (c_i + j_i + C),   C = mean(c + j) + 1e-9
c and j are the mean pooled latents of chosen and rejected responses, and C is a mean over all
latents. Without TopK latents can be negative; then means of |z_i| stand in the denominator. Every
source (a row's "source", else its file) has its own s. As in the reference, `combine` selects
whether the lists follow the s of all pairs or the mean of the sources' s.

Beyond the reference, each selected feature gets a threshold at which a penalty may start (the
quantile of z_i on the chosen responses) and the share of the responses above it on either side.
Detectors and carriers (`detectors`) are found as well, with the detectors' rates on held-out
prompts. Every listed feature has an interval, a false-discovery rate, its stability
(`contrast_statistics`), the responses that excite it most, and its neighbours in the decoder. The
result also holds the lists of the other method (`feature_methods`) and what a language model needs
to name the features (`naming_prompts`).
"""

import dataclasses
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from sarm_jax.features.contrast_statistics import (
    ContrastStatistics,
    assign_folds,
    bootstrap_differential,
    differential,
    half_differentials,
    measure_contrast,
    row_totals,
)
from sarm_jax.features.detectors import (
    Detectors,
    contrast_tau,
    find_detectors,
    held_out_rates,
    random_control,
)
from sarm_jax.features.feature_methods import (
    METHODS,
    MethodLists,
    describe_methods,
    rank_features,
    select_features,
)
from sarm_jax.features.neighbours import decoder_directions, nearest_features
from sarm_jax.features.strong_responses import StrongResponses, Text, strong_responses
from sarm_jax.io.errors import InputError
from sarm_jax.models.latent_store import Contrast
from sarm_jax.models.reward_model import RewardModel
from sarm_jax.parallel.finite import require_finite

DETECTOR_FOLDS = 5  # of the prompts, for the detectors' held-out rates
# Lists of selected_features.json: feature_analysis.json describes the features of the first ones.
DESCRIBED = ("safety_harming", "safety_promoting", "detectors", "random_control", "carriers")
ALTERNATIVES = ("alternative_safety_harming", "alternative_safety_promoting")


@dataclasses.dataclass(frozen=True)
class IdentifyConfig:
    """Options of the stage identify.

    Attributes:
        top_k: features of each list.
        method: "differential" or "head_weight", the method of the main lists.
        tau_quantile: quantile of z on the chosen responses that gives the thresholds.
        false_alarm_budget: largest false-positive rate of all detectors together.
        seed: seed of folds, bootstrap samples and random features.
        combine: "pooled" or "sources": s of all pairs, or the mean of the sources' s.
        resamples: bootstrap samples of the intervals.
        examples: responses of each feature in feature_analysis.json.
        naming_examples: responses of each feature in naming_prompts.jsonl.
    """

    top_k: int
    method: str
    tau_quantile: float
    false_alarm_budget: float
    seed: int
    combine: str = "pooled"
    resamples: int = 1000
    examples: int = 5
    naming_examples: int = 10

    def __post_init__(self) -> None:
        if self.top_k < 1:
            raise InputError(f"identify.top_k={self.top_k}: must be at least 1")
        if self.method not in METHODS:
            raise InputError(f"identify.method={self.method!r}: expected {' or '.join(METHODS)}")
        if self.combine not in ("pooled", "sources"):
            raise InputError(f"identify.combine={self.combine!r}: expected pooled or sources")
        for name, least in (("resamples", 100), ("examples", 0), ("naming_examples", 0)):
            if getattr(self, name) < least:
                raise InputError(f"identify.{name}={getattr(self, name)}: must be at least {least}")
        if self.seed < 0:
            raise InputError(f"identify.seed={self.seed}: must not be negative")
        if not 0 < self.tau_quantile < 1:
            raise InputError(f"identify.tau_quantile={self.tau_quantile}: must lie in (0, 1)")
        if not 0 <= self.false_alarm_budget < 1:
            raise InputError(
                f"identify.false_alarm_budget={self.false_alarm_budget}: must lie in [0, 1)"
            )


def pair_latents(
    reward_model: RewardModel, pairs: Sequence[Mapping[str, Any]]
) -> tuple[list[Text], Contrast]:
    """Scores every distinct (prompt, response) once.

    Returns:
        The distinct texts, and the pairs as a contrast of their latents.
    """
    texts = [(pair["prompt"], pair[side]) for side in ("chosen", "rejected") for pair in pairs]
    row = {text: i for i, text in enumerate(dict.fromkeys(texts))}
    _, latents = reward_model.store([p for p, _ in row], [r for _, r in row], "latents")
    chosen_p, rejected_p = np.split(np.array([row[text] for text in texts]), 2)
    return list(row), Contrast(latents, chosen_p, rejected_p)


@dataclasses.dataclass(frozen=True)
class Identified:
    """The results of the stage identify.

    Attributes:
        analysis: content of feature_analysis.json.
        selected: content of selected_features.json.
        scores: scores of all features `[M]` by name, for feature_scores.safetensors.
        strongest: the strongest responses of every feature in a list of `selected`.
        texts: the distinct responses with their prompts.
        contrast: the latents of `texts`, and which of them are chosen or rejected.
        tau_f: the threshold of every feature `[M]`.
        direction_fd: the decoder rows of length 1, as in `neighbours`.
    """

    analysis: dict[str, Any]
    selected: dict[str, Any]
    scores: dict[str, np.ndarray]
    strongest: list[StrongResponses]
    texts: list[Text]
    contrast: Contrast
    tau_f: np.ndarray
    direction_fd: np.ndarray


def identify(
    config: IdentifyConfig, reward_model: RewardModel, pairs: Sequence[Mapping[str, Any]]
) -> Identified:
    """Finds the features that tell the sides of preference pairs apart, and describes them."""
    texts, contrast = pair_latents(reward_model, pairs)
    prompt_p, _ = number_values([pair["prompt"] for pair in pairs])
    source_p, sources = number_values([pair.get("source") or "pairs" for pair in pairs])
    fold_p = assign_folds(prompt_p, config.seed)
    statistics = measure_contrast(contrast, prompt_p, source_p=source_p, fold_p=fold_p)
    scores = _scores(config, statistics, reward_model.feature_weights())
    methods = {name: select_features(scores[name], config.top_k) for name in METHODS}
    detection = _detect(config, contrast, fold_p)
    selected = _selected(
        config,
        methods,
        tau_f=detection.tau_f,
        detectors=detection.detectors,
        control=detection.control,
        carriers=select_features(scores["carried_reward"], config.top_k).promoting,
    )
    listed = strong_responses(
        contrast,
        _features_of(selected, (*DESCRIBED, *ALTERNATIVES)),
        texts=texts,
        count=max(config.examples, config.naming_examples),
        seed=config.seed,
    )
    direction_fd = decoder_directions(reward_model.sae)
    rows = _feature_rows(
        config,
        _features_of(selected, DESCRIBED),
        contrast=contrast,
        statistics=statistics,
        scores=scores,
        tau_f=detection.tau_f,
        prompt_p=prompt_p,
        sources=sources,
        strongest={strong.feature: strong for strong in listed},
        direction_fd=direction_fd,
    )
    counts = {name: int(n) for name, n in zip(sources, np.bincount(source_p), strict=True)}
    about_pairs = {
        "pairs": len(pairs),
        "prompts": int(prompt_p.max()) + 1,
        "sources": counts,
        "options": dataclasses.asdict(config),
    }
    features = _described(selected, rows, detection=detection, scores=scores)
    return Identified(
        analysis=about_pairs | features | describe_methods(**methods),
        selected=selected,
        scores=scores,
        strongest=listed,
        texts=texts,
        contrast=contrast,
        tau_f=detection.tau_f,
        direction_fd=direction_fd,
    )


@dataclasses.dataclass(frozen=True)
class _Detection:
    """Thresholds `[M]`, detectors with their held-out rates, and a random control."""

    tau_f: np.ndarray
    detectors: Detectors
    control: Detectors
    held_out: dict[str, float | None]


def _detect(config: IdentifyConfig, contrast: Contrast, fold_p: np.ndarray) -> _Detection:
    """Finds detectors of the rejected responses, on all pairs and on folds of the prompts."""
    tau_f = contrast_tau(contrast, config.tau_quantile)
    detectors = find_detectors(
        contrast, tau_f, budget=config.false_alarm_budget, max_features=config.top_k
    )
    detection, false_positives = held_out_rates(
        contrast,
        fold_p % DETECTOR_FOLDS,
        quantile=config.tau_quantile,
        budget=config.false_alarm_budget,
        max_features=config.top_k,
    )
    control = random_control(contrast, tau_f, exclude=detectors.features, seed=config.seed)
    return _Detection(tau_f, detectors, control, _held_out(detection, false_positives))


def _described(
    selected: Mapping[str, Any],
    rows: Mapping[int, dict[str, Any]],
    *,
    detection: _Detection,
    scores: Mapping[str, np.ndarray],
) -> dict[str, Any]:
    """Assembles the rows of all described features for feature_analysis.json, list by list."""
    return {
        "test": "median test within prompts, Benjamini-Yekutieli over all features that differ",
        "harming": [rows[i] for i in selected["safety_harming"]],
        "promoting": [rows[i] for i in selected["safety_promoting"]],
        "detectors": _joint(detection.detectors, rows) | detection.held_out,
        "random_control": _joint(detection.control, rows),
        "carriers": [
            rows[i] | {"carried_reward": float(scores["carried_reward"][i])}
            for i in selected["carriers"]
        ],
    }


def further_random_control(
    config: IdentifyConfig,
    reward_model: RewardModel,
    pairs: Sequence[Mapping[str, Any]],
    detectors: Sequence[int],
    draw: int,
) -> Detectors:
    """Draws another random control than that of `identify`, by the same rule.

    Args:
        config: the options that the detectors were found with.
        reward_model: the SARM.
        pairs: the pairs that they were found on.
        detectors: the detectors, which are never drawn.
        draw: number of the draw, from 1.
    """
    _, contrast = pair_latents(reward_model, pairs)
    tau_f = contrast_tau(contrast, config.tau_quantile)
    return random_control(contrast, tau_f, exclude=detectors, seed=[config.seed, draw])


def verbose_features(
    config: IdentifyConfig, reward_model: RewardModel, pairs: Sequence[Mapping[str, Any]]
) -> dict[str, Any]:
    """Finds what fires more on the rejected side of pairs whose chosen side is the concise one.

    Returns:
        `verbosity_features`, the features with the smallest s of all pairs, and their thresholds
        `tau_verbosity`, for selected_features.json.
    """
    _, contrast = pair_latents(reward_model, pairs)
    prompt_p, _ = number_values([pair["prompt"] for pair in pairs])
    statistics = measure_contrast(
        contrast,
        prompt_p,
        source_p=np.zeros_like(prompt_p),
        fold_p=assign_folds(prompt_p, config.seed),
    )
    features = select_features(_pooled(statistics), config.top_k).harming
    tau_f = contrast_tau(contrast, config.tau_quantile)
    return {"verbosity_features": features, "tau_verbosity": tau_f[features].tolist()}


def _scores(
    config: IdentifyConfig, statistics: ContrastStatistics, weight_f: np.ndarray
) -> dict[str, np.ndarray]:
    """Computes the scores of all features, float32 `[M]`, and s by source `[S, M]`.

    Raises:
        InputError: a score is not finite.
    """
    by_source_sf = _by_source(statistics)
    pooled_f = _pooled(statistics)
    scores = {
        "differential": pooled_f if config.combine == "pooled" else by_source_sf.mean(axis=0),
        "head_weight": weight_f,
        "carried_reward": weight_f * (statistics.rejected_f - statistics.chosen_f),
        "p_value": statistics.p_f,
        "false_discovery_rate": statistics.q_f,
        "differential_by_source": by_source_sf,
    }
    scores = {name: values.astype(np.float32) for name, values in scores.items()}
    require_finite(scores, "scores of the features")
    return scores


def _selected(
    config: IdentifyConfig,
    methods: Mapping[str, MethodLists],
    tau_f: np.ndarray,
    detectors: Detectors,
    control: Detectors,
    carriers: list[int],
) -> dict[str, Any]:
    """Assembles selected_features.json; the lists of the requested method come first."""
    main = methods[config.method]
    (other,) = (lists for name, lists in methods.items() if name != config.method)
    return {
        "safety_promoting": main.promoting,
        "safety_harming": main.harming,
        "tau_promoting": tau_f[main.promoting].tolist(),
        "tau_harming": tau_f[main.harming].tolist(),
        "detectors": list(detectors.features),
        "tau_detectors": list(detectors.tau),
        "carriers": carriers,
        "random_control": list(control.features),
        "tau_random_control": list(control.tau),
        "method": config.method,
        "alternative_safety_promoting": other.promoting,
        "alternative_safety_harming": other.harming,
    }


def _features_of(selected: Mapping[str, Any], names: Sequence[str]) -> list[int]:
    """Returns the distinct features of the named lists, in order of appearance."""
    return list(dict.fromkeys(i for name in names for i in selected[name]))


def _feature_rows(
    config: IdentifyConfig,
    ids: list[int],
    contrast: Contrast,
    statistics: ContrastStatistics,
    scores: Mapping[str, np.ndarray],
    tau_f: np.ndarray,
    prompt_p: np.ndarray,
    sources: list[str],
    strongest: Mapping[int, StrongResponses],
    direction_fd: np.ndarray,
) -> dict[int, dict[str, Any]]:
    """Describes each of the features `ids` for feature_analysis.json."""
    groups: tuple[Sequence[Mapping[str, Any]], ...] = (
        _columns(config, ids, statistics=statistics, scores=scores, tau_f=tau_f),
        _thresholds(contrast, ids, tau_f),
        _intervals(config, ids, contrast=contrast, prompt_p=prompt_p),
        _stability(config, ids, statistics),
        _sources(scores["differential_by_source"], sources, ids),
        [{"examples": strongest[i].examples[: config.examples]} for i in ids],
        _neighbours(
            ids,
            direction_fd,
            differential_f=scores["differential"],
            weight_f=scores["head_weight"],
        ),
    )
    return {
        i: {key: value for group in groups for key, value in group[n].items()}
        for n, i in enumerate(ids)
    }


def _columns(
    config: IdentifyConfig,
    ids: list[int],
    statistics: ContrastStatistics,
    scores: Mapping[str, np.ndarray],
    tau_f: np.ndarray,
) -> list[dict[str, Any]]:
    """Collects the numbers of each feature that are arrays over all features."""
    columns = {
        "score": scores[config.method],
        "differential": scores["differential"],
        "differential_pooled": _pooled(statistics),
        "head_weight": scores["head_weight"],
        "mean_chosen": statistics.chosen_f,
        "mean_rejected": statistics.rejected_f,
        "fires_chosen": statistics.fires_chosen_f,
        "fires_rejected": statistics.fires_rejected_f,
        "p_value": statistics.p_f,
        "false_discovery_rate": statistics.q_f,
        "tau": tau_f,
    }
    return [{"feature": i} | {name: float(x[i]) for name, x in columns.items()} for i in ids]


def _joint(detectors: Detectors, rows: Mapping[int, dict[str, Any]]) -> dict[str, Any]:
    """Describes features that fire together, with their joint rates."""
    return {
        "detection": detectors.detection_rate,
        "false_alarms": detectors.false_positive_rate,
        "features": [rows[i] for i in detectors.features],
    }


def _held_out(detection: float, false_positives: float) -> dict[str, float | None]:
    """Returns the held-out rates for JSON, which has no NaN."""
    rates = {"detection_held_out": detection, "false_alarms_held_out": false_positives}
    return {name: rate if np.isfinite(rate) else None for name, rate in rates.items()}


def number_values(values: Sequence[str]) -> tuple[np.ndarray, list[str]]:
    """Numbers the distinct values from 0: (the number of each value, the distinct values)."""
    number = {value: i for i, value in enumerate(dict.fromkeys(values))}
    return np.array([number[value] for value in values]), list(number)


def _pooled(statistics: ContrastStatistics) -> np.ndarray:
    """Computes s `[M]` of all pairs."""
    return differential(statistics.chosen_f, statistics.rejected_f, statistics.activity_f)


def _by_source(statistics: ContrastStatistics) -> np.ndarray:
    """Computes s `[S, M]` of each source."""
    pairs_s1 = statistics.pairs_s.sum(axis=1)[:, None]
    sums = statistics.chosen_sf, statistics.rejected_sf, statistics.activity_sf
    chosen_sf, rejected_sf, activity_sf = (x.sum(axis=1) / pairs_s1 for x in sums)
    return np.array(
        [
            differential(c, j, activity)
            for c, j, activity in zip(chosen_sf, rejected_sf, activity_sf, strict=True)
        ]
    )


def _thresholds(contrast: Contrast, ids: list[int], tau_f: np.ndarray) -> list[dict[str, float]]:
    """Computes the share of the responses above the threshold on either side."""
    chosen_n, rejected_n = ((z > tau_f[ids]).mean(axis=0) for z in contrast.columns(ids))
    return [
        {"above_tau_chosen": float(c), "above_tau_rejected": float(j)}
        for c, j in zip(chosen_n, rejected_n, strict=True)
    ]


def _intervals(
    config: IdentifyConfig, ids: list[int], contrast: Contrast, prompt_p: np.ndarray
) -> list[dict[str, list[float]]]:
    """Computes 95 % bootstrap intervals of the pooled s."""
    chosen_pn, rejected_pn = contrast.columns(ids)
    low_n, high_n = bootstrap_differential(
        chosen_pn,
        rejected_pn,
        total_p=row_totals(contrast),
        size=contrast.size,
        prompt_p=prompt_p,
        resamples=config.resamples,
        seed=config.seed,
    )
    return [
        {"differential_pooled_95": [float(a), float(b)]} for a, b in zip(low_n, high_n, strict=True)
    ]


def _stability(
    config: IdentifyConfig, ids: list[int], statistics: ContrastStatistics
) -> list[dict[str, float | None]]:
    """Computes the share of half splits with the feature in the `top_k` of its own direction."""
    s_rf = half_differentials(statistics, config.seed)
    if not len(s_rf):
        return [{"stability": None} for _ in ids]
    lowest_rf, highest_rf = rank_features(s_rf)
    tops = {-1: lowest_rf[:, : config.top_k], 1: highest_rf[:, : config.top_k]}
    sign_f = np.where(statistics.chosen_f < statistics.rejected_f, -1, 1)
    return [{"stability": float((tops[int(sign_f[i])] == i).any(axis=1).mean())} for i in ids]


def _sources(
    by_source_sf: np.ndarray, sources: list[str], ids: list[int]
) -> list[dict[str, dict[str, float]]]:
    """Lists s of each feature by the name of the source."""
    return [
        {"differential_by_source": dict(zip(sources, by_source_sf[:, i].tolist(), strict=True))}
        for i in ids
    ]


def _neighbours(
    ids: list[int], direction_fd: np.ndarray, differential_f: np.ndarray, weight_f: np.ndarray
) -> list[dict[str, list[dict[str, float]]]]:
    """Describes the features with the most similar decoder rows."""
    return [
        {
            "neighbours": [
                {
                    "feature": n,
                    "cosine": cosine,
                    "differential": float(differential_f[n]),
                    "head_weight": float(weight_f[n]),
                }
                for n, cosine in nearest
            ]
        }
        for nearest in nearest_features(direction_fd, ids)
    ]
