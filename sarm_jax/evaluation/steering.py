"""Steering, before and after: which responses does a change of features reach?

A set holds the responses of one type (chosen, rejected, complement, …) from one source: a file, or
several files that were given the same name. A set is named after its type or, if files were given
names or have a type in common, after source and type (rb2_safety_chosen). Every prompt counts once,
with the mean over its responses in the set, because the responses to one prompt are not
independent. With |Δ| the absolute change of a score:

    specificity = m_target / (m_target + m_other),   m the mean |Δ| over responses

It is 1 if only the target sets change and 0.5 if the other sets change as much. Its interval is the
2.5 % and 97.5 % quantile over bootstrap samples of prompts, each with all of its responses.

Source: SARM (arXiv 2508.08746) plots the two distributions; the number and its interval are added.
"""

import dataclasses
from collections.abc import Sequence
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np

from sarm_jax.evaluation.benchmark_files import (
    NamedFile,
    fields_of,
    parse_all,
    text,
)
from sarm_jax.evaluation.controls import (
    CONTROLLED,
    PLAIN,
    Controls,
    ScoredVariants,
    score_variants,
)
from sarm_jax.io.errors import InputError
from sarm_jax.io.hub_files import single_files
from sarm_jax.io.row_files import read_placed_rows
from sarm_jax.models.reward_model import RewardModel
from sarm_jax.reporting.statistics import mean_interval

DEFAULT_TARGET = "rejected"
BATCH = 256  # bootstrap samples computed at a time


@dataclasses.dataclass(frozen=True)
class SteeringConfig:
    """Options of the evaluation under steering.

    `num_example` responses of every set are scored, all of them if it is 0. `steering_targets` are
    the types or sets that are meant to change; if it is empty, the type "rejected", if present.
    """

    num_example: int
    steering_targets: tuple[str, ...]
    resamples: int
    seed: int

    def __post_init__(self) -> None:
        if self.num_example < 0:
            raise InputError(f"evaluate.num_example={self.num_example}: must not be negative")
        if self.resamples < 100:
            raise InputError(f"evaluate.resamples={self.resamples}: must be at least 100")
        if not 0 <= self.seed < 2**31:
            raise InputError(f"evaluate.seed={self.seed}: must lie in [0, 2^31)")


@dataclasses.dataclass(frozen=True)
class Answer:
    """A response with its type and source; `name` is the name of its set, if not the type."""

    prompt: str
    response: str
    kind: str
    source: str = ""
    name: str = ""

    @property
    def set_name(self) -> str:
        """The name of the set that the response belongs to."""
        return self.name or self.kind


@dataclasses.dataclass(frozen=True)
class SteeringResult:
    """The content of steering.json (`summary`) and the rows of steering_rows.jsonl."""

    summary: dict[str, Any]
    rows: list[dict[str, Any]]


def read_answer_sets(files: Sequence[NamedFile]) -> list[Answer]:
    """Reads the answers of all files, each with the name of its set.

    Raises:
        InputError: a file or row is bad, or two sets would have the same name.
    """
    answers = [answer for file in files for answer in read_answers(file.path, file.name)]
    keys = list(dict.fromkeys((answer.source, answer.kind) for answer in answers))
    kinds = [kind for _, kind in keys]
    if len(set(kinds)) == len(kinds) and not any(file.named_by_user for file in files):
        return answers
    names = [_set_name(source, kind) for source, kind in keys]
    if len(set(names)) < len(names):
        names = [f"{source}_{kind}" for source, kind in keys]
    for name in names:
        if names.count(name) > 1:
            raise InputError(
                f"evaluate.data_jsonl: two sets are called {name!r}: give the files other names, "
                "as NAME=FILE"
            )
    name_of = dict(zip(keys, names, strict=True))
    return [dataclasses.replace(a, name=name_of[a.source, a.kind]) for a in answers]


def _set_name(source: str, kind: str) -> str:
    """Joins source and type, unless the source ends with the type."""
    suffixes = tuple(f"{sign}{kind}" for sign in "_-/")
    return source if source == kind or source.endswith(suffixes) else f"{source}_{kind}"


def read_answers(path: str | Path, source: str = "") -> list[Answer]:
    """Reads {question, answer, type} rows.

    The names prompt, response and label are accepted as well; without a type, the stem of the file
    is the type.

    Args:
        path: the file.
        source: the name of the file; empty: its stem.
    """

    def parse(content: Any, stem: str) -> Answer:
        row = fields_of(content)
        kind = text({"file": stem} | row, "type", "label", "file")
        prompt, response = text(row, "question", "prompt"), text(row, "answer", "response")
        return Answer(prompt=prompt, response=response, kind=kind, source=source or stem)

    return [
        answer
        for name in single_files(path)
        for answer in parse_all(read_placed_rows(name), partial(parse, stem=Path(name).stem))
    ]


def check_steering(config: SteeringConfig, answers: Sequence[Answer], controls: Controls) -> None:
    """Checks that features change and that every target has answers; raises InputError if not."""
    if controls.intervention is None:
        raise InputError(
            "evaluate.data_jsonl: no feature is steered: give evaluate.steering_json or "
            "reward.clamp_features"
        )
    kinds, sets = {a.kind for a in answers}, {a.set_name for a in answers}
    for name in config.steering_targets:
        if name not in kinds | sets:
            names = ", ".join([*sorted(kinds), *sorted(sets - kinds)])
            raise InputError(
                f"evaluate.steering_targets: no answers of type {name!r}, there are {names}"
            )


def choose_answers(config: SteeringConfig, answers: Sequence[Answer]) -> list[Answer]:
    """Draws `num_example` answers of every set at random, without changing their order, or all."""
    if not config.num_example:
        return list(answers)
    rng = np.random.default_rng(config.seed)
    chosen: dict[str, list[int]] = {}
    for i in rng.permutation(len(answers)).tolist():
        indices = chosen.setdefault(answers[i].set_name, [])
        if len(indices) < config.num_example:
            indices.append(i)
    return [answers[i] for i in sorted(i for indices in chosen.values() for i in indices)]


def evaluate_steering(
    config: SteeringConfig, model: RewardModel, answers: Sequence[Answer], controls: Controls
) -> SteeringResult:
    """Scores answers without and with the clamped and steered features.

    Raises:
        InputError: no feature is steered, or a target has no answers.
    """
    check_steering(config, answers, controls)
    answers = choose_answers(config, answers)
    prompts, responses = [a.prompt for a in answers], [a.response for a in answers]
    unpenalised = dataclasses.replace(controls, penalize_features=())  # no penalty is reported
    scored = score_variants(model, prompts, responses, controls=unpenalised)
    before_b = np.asarray(scored.variants[PLAIN], np.float64)
    after_b = np.asarray(scored.variants[CONTROLLED], np.float64)
    sets: dict[str, dict[str, Any]] = {}
    for name in dict.fromkeys(answer.set_name for answer in answers):
        indices = [i for i, answer in enumerate(answers) if answer.set_name == name]
        set_prompts, first = [prompts[i] for i in indices], answers[indices[0]]
        sets[name] = {"source": first.source, "type": first.kind}
        sets[name] |= _set_summary(set_prompts, before_b[indices], after_b[indices])
        sets[name]["active"] = _active_shares(scored, controls, indices)
    targets = {*(config.steering_targets or (DEFAULT_TARGET,))}
    target_b = np.array([bool(targets & {a.kind, a.set_name}) for a in answers])
    target_sets = {a.set_name for a, is_target in zip(answers, target_b, strict=True) if is_target}
    summary = {
        "options": dataclasses.asdict(config),
        "features": list(controls.changed_features),
        "sets": sets,
        "specificity": {
            "targets": [name for name in sets if name in target_sets],
            "others": [name for name in sets if name not in target_sets],
            **specificity(config, prompts, size_b=np.abs(after_b - before_b), target_b=target_b),
        },
    }
    rows = _rows(answers, scored, controls, before_b=before_b, after_b=after_b)
    return SteeringResult(summary, rows)


def specificity(
    config: SteeringConfig,
    prompts: Sequence[str],
    *,
    size_b: np.ndarray,
    target_b: np.ndarray,
) -> dict[str, Any]:
    """Computes the specificity of a change and its bootstrap interval.

    Args:
        config: number of bootstrap samples and their seed.
        prompts: the prompt of each response.
        size_b: |Δ| of each response's score.
        target_b: True for responses that are meant to change.

    Returns:
        `mean`, `low` and `high`; if the specificity is undefined, these are None and `why` states
        the reason.
    """
    undefined: dict[str, Any] = {"mean": None, "low": None, "high": None}
    if target_b.all() or not target_b.any():
        return undefined | {"why": "needs a set that is meant to change and one that is not"}
    if not size_b.any():
        return undefined | {"why": "no score changed"}
    number = {prompt: i for i, prompt in enumerate(dict.fromkeys(prompts))}
    prompt_b = np.array([number[prompt] for prompt in prompts])
    # For each prompt p: sum and count of |Δ| over its target responses, then over the others.
    total_gp = np.zeros((4, len(number)))
    for row, group_b in ((0, target_b), (2, ~target_b)):
        np.add.at(total_gp[row], prompt_b[group_b], size_b[group_b])
        np.add.at(total_gp[row + 1], prompt_b[group_b], 1)
    rng = np.random.default_rng(config.seed)
    samples = []
    for start in range(0, config.resamples, BATCH):
        count = min(BATCH, config.resamples - start)
        weight_rp = rng.multinomial(len(number), [1 / len(number)] * len(number), count)
        samples.append(_target_share(weight_rp @ total_gp.T))
    sample_r = np.concatenate(samples)
    # A bootstrap sample without targets, without others or without changes has no specificity.
    sample_r = sample_r[np.isfinite(sample_r)]
    point = _target_share(total_gp.sum(axis=1)[None])[0]
    low, high = np.quantile(sample_r, (0.025, 0.975)) if len(sample_r) else (None, None)
    return {
        "mean": float(point),
        "low": low if low is None else float(low),
        "high": high if high is None else float(high),
        "prompts": len(number),
        "resamples": len(sample_r),
    }


def _target_share(total_rg: np.ndarray) -> np.ndarray:
    """Returns m_target / (m_target + m_other) for rows of (sum, count) of targets and others."""
    with np.errstate(divide="ignore", invalid="ignore"):
        target_r = total_rg[:, 0] / total_rg[:, 1]
        other_r = total_rg[:, 2] / total_rg[:, 3]
        return target_r / (target_r + other_r)


def _set_summary(
    prompts: Sequence[str], before_b: np.ndarray, after_b: np.ndarray
) -> dict[str, Any]:
    change_b = after_b - before_b
    return {
        "responses": len(prompts),
        "prompts": len(set(prompts)),
        "before": mean_interval(_means_by_prompt(prompts, before_b)),
        "after": mean_interval(_means_by_prompt(prompts, after_b)),
        "change": mean_interval(_means_by_prompt(prompts, change_b)),
        "absolute_change": mean_interval(_means_by_prompt(prompts, np.abs(change_b))),
        "standard_deviation_before": float(before_b.std()),
        "unchanged": float((change_b == 0).mean()),
        "scores": {"before": before_b.tolist(), "after": after_b.tolist()},
    }


def _means_by_prompt(prompts: Sequence[str], values_b: np.ndarray) -> list[float]:
    groups: dict[str, list[float]] = {}
    for prompt, value in zip(prompts, values_b.tolist(), strict=True):
        groups.setdefault(prompt, []).append(value)
    return [float(np.mean(group)) for group in groups.values()]


def _active_shares(
    scored: ScoredVariants, controls: Controls, indices: Sequence[int]
) -> dict[str, float]:
    """Returns, for each changed feature, the share of these responses on which it is not 0."""
    share_n = (scored.z_bn[list(indices)] != 0).mean(axis=0)
    return {str(i): float(share_n[scored.features.index(i)]) for i in controls.changed_features}


def _rows(
    answers: Sequence[Answer],
    scored: ScoredVariants,
    controls: Controls,
    *,
    before_b: np.ndarray,
    after_b: np.ndarray,
) -> list[dict[str, Any]]:
    """Returns the rows of steering_rows.jsonl."""
    rows = []
    for answer, before, after, z_n in zip(answers, before_b, after_b, scored.z_bn, strict=True):
        active = [i for i in controls.changed_features if z_n[scored.features.index(i)] != 0]
        row = {
            "question": answer.prompt,
            "answer": answer.response,
            "type": answer.kind,
            "source": answer.source,
            "reward": float(before),
            "reward_steered": float(after),
            "activated_latents": active,
        }
        rows.append(row)
    return rows


def parse_targets(names: str) -> tuple[str, ...]:
    """Splits comma-separated types or sets, each kept once."""
    return tuple(dict.fromkeys(name.strip() for name in names.split(",") if name.strip()))
