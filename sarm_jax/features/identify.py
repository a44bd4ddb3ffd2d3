"""Finding features: which latents tell chosen from rejected responses.

Two methods, as in the reference implementation:
    head weight               the most positive and the most negative w_i
    differential activation   s_i = (c_i − j_i) / (c_i + j_i + C),   C = mean(c + j) + 1e-9
with c and j the mean pooled latents of chosen and rejected responses, and C a mean over all
latents (where they can be negative, without TopK, means of |z_i| stand in the denominator).
Every source (a row's "source", else its file) has its own s; `combine` says whether the lists
follow s of all pairs or the mean of the sources' s, as in the reference.

Beyond it: a threshold for every selected feature, the quantile of z_i on the chosen responses that
a penalty may start at, with the share of responses above it on either side; detectors and carriers
(`detectors`), with what detectors do on prompts that they were not found on; and for every listed
feature an interval, a false-discovery rate, its stability (`contrast_statistics`), the responses
that excite it most, and its neighbours in the decoder. The lists of the other method are given
too (`feature_methods`), and what a language model needs to name the features (`naming_prompts`).
"""

import dataclasses
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from sarm_jax.features.contrast_statistics import (
    ContrastStatistics,
    bootstrap_differential,
    differential,
    folds_of,
    half_differentials,
    measure,
    row_totals,
)
from sarm_jax.features.detectors import (
    Detectors,
    find_detectors,
    held_out_rates,
    random_control,
    taus_of,
)
from sarm_jax.features.feature_methods import METHODS, MethodLists, both_methods, lists_of, ranks_of
from sarm_jax.features.strong_responses import StrongResponses, Text, strong_responses
from sarm_jax.io.errors import InputError
from sarm_jax.models.latent_store import Contrast
from sarm_jax.models.reward_model import RewardModel
from sarm_jax.models.sae import SAE

NEIGHBOURS = 5
DETECTOR_FOLDS = 5  # of the prompts, for what detectors do elsewhere
# Lists of selected_features.json: those whose features feature_analysis.json describes, and others.
DESCRIBED = ("safety_harming", "safety_promoting", "detectors", "random_control", "carriers")
ALTERNATIVES = ("alternative_safety_harming", "alternative_safety_promoting")


@dataclasses.dataclass(frozen=True)
class IdentifyConfig:
    """`top_k` features per list; `method` is differential or head_weight."""

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
    reward_model: RewardModel, pairs: Sequence[Mapping[str, str]]
) -> tuple[list[Text], Contrast]:
    """The distinct (prompt, response) texts, each scored once, and the pairs among them."""
    texts = [(pair["prompt"], pair[side]) for side in ("chosen", "rejected") for pair in pairs]
    row = {text: i for i, text in enumerate(dict.fromkeys(texts))}
    _, latents = reward_model.store([p for p, _ in row], [r for _, r in row], "latents")
    return list(row), Contrast(latents, *np.split(np.array([row[text] for text in texts]), 2))


@dataclasses.dataclass(frozen=True)
class Identified:
    """What identify writes: feature_analysis.json, selected_features.json, scores `[M]` by name.

    `strongest` has, for every feature in a list of `selected`, the responses to name it by.
    """

    analysis: dict[str, Any]
    selected: dict[str, Any]
    scores: dict[str, np.ndarray]
    strongest: list[StrongResponses]


def identify(
    config: IdentifyConfig, reward_model: RewardModel, pairs: Sequence[Mapping[str, str]]
) -> Identified:
    """Finds the features that tell the sides of preference pairs apart, and describes them."""
    texts, contrast = pair_latents(reward_model, pairs)
    prompt_p, _ = _number([pair["prompt"] for pair in pairs])
    source_p, sources = _number([pair.get("source") or "pairs" for pair in pairs])
    fold_p = folds_of(prompt_p, config.seed)
    statistics = measure(contrast, prompt_p, source_p, fold_p)
    scores = _scores(config, statistics, np.asarray(reward_model.model.score[...], np.float32))
    methods = {name: lists_of(scores[name], config.top_k) for name in METHODS}
    tau_f = taus_of(contrast, config.tau_quantile)
    detectors = find_detectors(contrast, tau_f, config.false_alarm_budget, config.top_k)
    held_out = held_out_rates(
        contrast,
        fold_p % DETECTOR_FOLDS,
        config.tau_quantile,
        config.false_alarm_budget,
        config.top_k,
    )
    control = random_control(contrast, tau_f, detectors.features, config.seed)
    carriers = lists_of(scores["carried_reward"], config.top_k).promoting
    selected = _selected(config, methods, tau_f, detectors, control, carriers)
    described, others = (
        list(dict.fromkeys(i for name in names for i in selected[name]))
        for names in (DESCRIBED, ALTERNATIVES)
    )
    listed = list(dict.fromkeys([*described, *others]))
    shown = max(config.examples, config.naming_examples)
    strongest = {
        strong.feature: strong
        for strong in strong_responses(contrast, listed, texts, shown, config.seed)
    }
    parts: tuple[Sequence[Mapping[str, Any]], ...] = (
        _columns(config, statistics, scores, tau_f, described),
        _thresholds(contrast, described, tau_f),
        _intervals(contrast, described, prompt_p, config),
        _stability(statistics, described, config),
        _sources(scores["differential_by_source"], sources, described),
        [{"examples": strongest[i].examples[: config.examples]} for i in described],
        _neighbours(
            reward_model.model.sae, described, scores["differential"], scores["head_weight"]
        ),
    )
    rows = {
        i: {k: v for part in parts for k, v in part[n].items()} for n, i in enumerate(described)
    }
    analysis = {
        "pairs": len(pairs),
        "prompts": int(prompt_p.max()) + 1,
        "sources": {name: int(n) for name, n in zip(sources, np.bincount(source_p), strict=True)},
        "options": dataclasses.asdict(config),
        "test": "median test within prompts, Benjamini-Yekutieli over all features that differ",
        "harming": [rows[i] for i in selected["safety_harming"]],
        "promoting": [rows[i] for i in selected["safety_promoting"]],
        "detectors": _together(detectors, rows)
        | {
            f"{name}_held_out": rate if np.isfinite(rate) else None
            for name, rate in zip(("detection", "false_alarms"), held_out, strict=True)
        },
        "random_control": _together(control, rows),
        "carriers": [
            rows[i] | {"carried_reward": float(scores["carried_reward"][i])} for i in carriers
        ],
        **both_methods(**methods),
    }
    return Identified(analysis, selected, scores, list(strongest.values()))


def verbose_features(
    config: IdentifyConfig, reward_model: RewardModel, pairs: Sequence[Mapping[str, str]]
) -> dict[str, Any]:
    """Finds what fires more on the rejected side of pairs whose chosen side is the concise one.

    Returns:
        `verbosity_features`, those with the smallest s of all pairs, and their `tau_verbosity`,
        for selected_features.json.
    """
    _, contrast = pair_latents(reward_model, pairs)
    prompt_p, _ = _number([pair["prompt"] for pair in pairs])
    statistics = measure(
        contrast, prompt_p, np.zeros_like(prompt_p), folds_of(prompt_p, config.seed)
    )
    found = lists_of(_pooled(statistics), config.top_k).harming
    tau_f = taus_of(contrast, config.tau_quantile)
    return {"verbosity_features": found, "tau_verbosity": tau_f[found].tolist()}


def _scores(
    config: IdentifyConfig, statistics: ContrastStatistics, weight_f: np.ndarray
) -> dict[str, np.ndarray]:
    """The scores of all features, float32 `[M]`, s also `[S, M]` by source."""
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
    return {name: values.astype(np.float32) for name, values in scores.items()}


def _selected(
    config: IdentifyConfig,
    methods: Mapping[str, MethodLists],
    tau_f: np.ndarray,
    detectors: Detectors,
    control: Detectors,
    carriers: list[int],
) -> dict[str, Any]:
    """selected_features.json: the lists of the method that was asked for come first."""
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


def _columns(
    config: IdentifyConfig,
    statistics: ContrastStatistics,
    scores: Mapping[str, np.ndarray],
    tau_f: np.ndarray,
    ids: list[int],
) -> list[dict[str, Any]]:
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


def _together(detectors: Detectors, rows: Mapping[int, dict[str, Any]]) -> dict[str, Any]:
    return {
        "detection": detectors.detection,
        "false_alarms": detectors.false_alarms,
        "features": [rows[i] for i in detectors.features],
    }


def _number(values: Sequence[str]) -> tuple[np.ndarray, list[str]]:
    """The place of each value among the distinct ones, which come second."""
    place = {value: i for i, value in enumerate(dict.fromkeys(values))}
    return np.array([place[value] for value in values]), list(place)


def _pooled(found: ContrastStatistics) -> np.ndarray:
    """s `[M]` of all pairs."""
    return differential(found.chosen_f, found.rejected_f, found.activity_f)


def _by_source(found: ContrastStatistics) -> np.ndarray:
    """s `[S, M]` of each source."""
    pairs_s1 = found.pairs_s.sum(axis=1)[:, None]
    sums = found.chosen_sf, found.rejected_sf, found.activity_sf
    means = (x.sum(axis=1) / pairs_s1 for x in sums)
    return np.array([differential(*of_source) for of_source in zip(*means, strict=True)])


def _thresholds(contrast: Contrast, ids: list[int], tau_f: np.ndarray) -> list[dict[str, float]]:
    chosen_n, rejected_n = ((z > tau_f[ids]).mean(axis=0) for z in contrast.columns(ids))
    return [
        {"above_tau_chosen": float(c), "above_tau_rejected": float(j)}
        for c, j in zip(chosen_n, rejected_n, strict=True)
    ]


def _intervals(
    contrast: Contrast, ids: list[int], prompt_p: np.ndarray, config: IdentifyConfig
) -> list[dict[str, list[float]]]:
    """95 % bootstrap intervals of the pooled s."""
    low_n, high_n = bootstrap_differential(
        *contrast.columns(ids), row_totals(contrast), contrast.size, prompt_p,
        config.resamples, config.seed,
    )  # fmt: skip
    return [
        {"differential_pooled_95": [float(a), float(b)]} for a, b in zip(low_n, high_n, strict=True)
    ]


def _stability(
    found: ContrastStatistics, ids: list[int], config: IdentifyConfig
) -> list[dict[str, float | None]]:
    """The share of half splits that put the feature among the `top_k` of its own direction."""
    s_rf = half_differentials(found, config.seed)
    if not len(s_rf):
        return [{"stability": None} for _ in ids]
    lowest_rf, highest_rf = ranks_of(s_rf)
    tops = {-1: lowest_rf[:, : config.top_k], 1: highest_rf[:, : config.top_k]}
    sign_f = np.where(found.chosen_f < found.rejected_f, -1, 1)
    return [{"stability": float((tops[int(sign_f[i])] == i).any(axis=1).mean())} for i in ids]


def _sources(
    by_source_sf: np.ndarray, sources: list[str], ids: list[int]
) -> list[dict[str, dict[str, float]]]:
    return [
        {"differential_by_source": dict(zip(sources, by_source_sf[:, i].tolist(), strict=True))}
        for i in ids
    ]


def _neighbours(
    sae: SAE, ids: list[int], differential_f: np.ndarray, weight_f: np.ndarray
) -> list[dict[str, list[dict[str, float]]]]:
    """The features with the most similar decoder rows: what a policy may slip into."""
    decoder_fd = np.asarray(sae.decoder[...], np.float32)
    decoder_fd = decoder_fd / np.maximum(np.linalg.norm(decoder_fd, axis=1, keepdims=True), 1e-12)
    listed = []
    for i in ids:
        cosine_f = decoder_fd @ decoder_fd[i]
        cosine_f[i] = -np.inf
        nearest = np.argsort(-cosine_f, kind="stable")[:NEIGHBOURS]
        rows = [
            {
                "feature": int(n),
                "cosine": float(cosine_f[n]),
                "differential": float(differential_f[n]),
                "head_weight": float(weight_f[n]),
            }
            for n in nearest
            if n != i
        ]
        listed.append({"neighbours": rows})
    return listed
