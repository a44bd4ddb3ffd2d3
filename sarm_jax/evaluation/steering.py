"""Steering, before and after: which responses does a change of features reach?

A set is the responses of one type (chosen, rejected, complement, …) from one source: a file, or
several that were given the same name. A set is called after its type or, if files were named or
have a type in common, after source and type (rb2_safety_chosen). Every prompt counts once, with the
mean over its responses in the set, since the responses to one prompt are not independent.
With |Δ| the size of a score's change:

    specificity = m_target / (m_target + m_other),   m the mean |Δ| over responses

1 if only the target sets change, 0.5 if the others change as much. Its interval is the 2.5 % and
97.5 % quantile over bootstrap samples of prompts, each with all of its responses.

Source: SARM (arXiv 2508.08746) plots the two distributions; the interval and the number are ours.
"""

import dataclasses
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np

from sarm_jax.evaluation.benchmark_files import (
    NamedFile,
    fields_of,
    parse_all,
    read_rows,
    text,
)
from sarm_jax.evaluation.controls import CONTROLLED, PLAIN, Controls, Scored, score_variants
from sarm_jax.io.errors import InputError
from sarm_jax.models.reward_model import RewardModel
from sarm_jax.reporting.statistics import mean_interval

DEFAULT_TARGET = "rejected"
BATCH = 256  # bootstrap samples at a time


@dataclasses.dataclass(frozen=True)
class SteeringConfig:
    """`num_example` responses of every set, 0 for all; `steering_targets` are the types or sets
    that are meant to change (empty: "rejected", if there is such a type)."""

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
    """One response with its type and source; `name` is that of its set, if not the type."""

    prompt: str
    response: str
    kind: str
    source: str = ""
    name: str = ""

    @property
    def set_name(self) -> str:
        """The set that it belongs to."""
        return self.name or self.kind


@dataclasses.dataclass(frozen=True)
class SteeringResult:
    """`summary` is the content of steering.json, `rows` those of steering_rows.jsonl."""

    summary: dict[str, Any]
    rows: list[dict[str, Any]]


def read_answer_sets(files: Sequence[NamedFile]) -> list[Answer]:
    """The answers of all files, each with the name of its set."""
    answers = [answer for file in files for answer in read_answers(file.path, file.name)]
    keys = list(dict.fromkeys((answer.source, answer.kind) for answer in answers))
    kinds = [kind for _, kind in keys]
    if len(set(kinds)) == len(kinds) and not any(file.given for file in files):
        return answers
    names = [_set_name(*key) for key in keys]
    if len(set(names)) < len(names):
        names = [f"{source}_{kind}" for source, kind in keys]
    for name in names:
        if names.count(name) > 1:
            raise InputError(
                f"evaluate.data_jsonl: two sets are called {name!r}: name the files in another "
                "way, as NAME=FILE"
            )
    name_of = dict(zip(keys, names, strict=True))
    return [dataclasses.replace(a, name=name_of[a.source, a.kind]) for a in answers]


def _set_name(source: str, kind: str) -> str:
    """Source and type; a source that ends with the type already has it."""
    ends = tuple(f"{sign}{kind}" for sign in "_-/")
    return source if source == kind or source.endswith(ends) else f"{source}_{kind}"


def read_answers(path: str | Path, source: str = "") -> list[Answer]:
    """{question, answer, type} lines; also prompt, response, and label, or the file's name.

    `source` is the name of the file, its stem if empty.
    """
    stem = Path(path).stem

    def parse(content: Any) -> Answer:
        row = fields_of(content)
        kind = text({"file": stem} | row, *(n for n in ("type", "label") if n in row), "file")
        prompt, response = text(row, "question", "prompt"), text(row, "answer", "response")
        return Answer(prompt, response, kind, source or stem)

    return parse_all(read_rows(path), parse)


def check_steering(config: SteeringConfig, answers: Sequence[Answer], controls: Controls) -> None:
    """Raises InputError if nothing is steered, or a target has no answers."""
    if controls.change is None:
        raise InputError(
            "evaluate.data_jsonl: nothing is steered: give evaluate.steering_json or clamp features"
        )
    kinds, sets = {a.kind for a in answers}, {a.set_name for a in answers}
    for name in config.steering_targets:
        if name not in kinds | sets:
            have = ", ".join([*sorted(kinds), *sorted(sets - kinds)])
            raise InputError(
                f"evaluate.steering_targets: no answers of type {name!r}, there are {have}"
            )


def choose_answers(config: SteeringConfig, answers: Sequence[Answer]) -> list[Answer]:
    """Of every set its first `num_example` answers in random order, or all."""
    if not config.num_example:
        return list(answers)
    rng = np.random.default_rng(config.seed)
    taken: dict[str, list[int]] = {}
    for i in rng.permutation(len(answers)).tolist():
        group = taken.setdefault(answers[i].set_name, [])
        if len(group) < config.num_example:
            group.append(i)
    return [answers[i] for i in sorted(i for group in taken.values() for i in group)]


def evaluate_steering(
    config: SteeringConfig, model: RewardModel, answers: Sequence[Answer], controls: Controls
) -> SteeringResult:
    """Scores the chosen answers without and with the clamped and steered features."""
    check_steering(config, answers, controls)
    answers = choose_answers(config, answers)
    prompts, responses = [a.prompt for a in answers], [a.response for a in answers]
    scored = score_variants(model, prompts, responses, controls)
    before_b = np.asarray(scored.variants[PLAIN], np.float64)
    after_b = np.asarray(scored.variants[CONTROLLED], np.float64)
    sets: dict[str, dict[str, Any]] = {}
    for name in dict.fromkeys(answer.set_name for answer in answers):
        place = [i for i, answer in enumerate(answers) if answer.set_name == name]
        names, first = [prompts[i] for i in place], answers[place[0]]
        sets[name] = {"source": first.source, "type": first.kind}
        sets[name] |= _set_summary(names, before_b[place], after_b[place])
        sets[name]["active"] = _active(scored, controls, place)
    wanted = {*(config.steering_targets or (DEFAULT_TARGET,))}
    target_b = np.array([bool(wanted & {a.kind, a.set_name}) for a in answers])
    targets = {a.set_name for a, is_target in zip(answers, target_b, strict=True) if is_target}
    summary = {
        "options": dataclasses.asdict(config),
        "features": list(controls.changed),
        "sets": sets,
        "specificity": {
            "targets": [name for name in sets if name in targets],
            "others": [name for name in sets if name not in targets],
            **specificity(config, prompts, np.abs(after_b - before_b), target_b),
        },
    }
    return SteeringResult(summary, _rows(answers, before_b, after_b, scored, controls))


def specificity(
    config: SteeringConfig, prompts: Sequence[str], size_b: np.ndarray, target_b: np.ndarray
) -> dict[str, Any]:
    """`mean` with `low` and `high`, None where there is nothing to compare, and why."""
    nothing: dict[str, Any] = {"mean": None, "low": None, "high": None}
    if target_b.all() or not target_b.any():
        return nothing | {"why": "needs a set that is meant to change and one that is not"}
    if not size_b.any():
        return nothing | {"why": "no score changed"}
    number = {prompt: i for i, prompt in enumerate(dict.fromkeys(prompts))}
    prompt_b = np.array([number[prompt] for prompt in prompts])
    total_gp = np.zeros((4, len(number)))  # sums and counts, on the target and elsewhere
    for row, of_group in ((0, target_b), (2, ~target_b)):
        np.add.at(total_gp[row], prompt_b[of_group], size_b[of_group])
        np.add.at(total_gp[row + 1], prompt_b[of_group], 1)
    rng = np.random.default_rng(config.seed)
    share_r = []
    for start in range(0, config.resamples, BATCH):
        count = min(BATCH, config.resamples - start)
        weight_rp = rng.multinomial(len(number), [1 / len(number)] * len(number), count)
        share_r.append(_share(weight_rp @ total_gp.T))
    found_r = np.concatenate(share_r)
    found_r = found_r[np.isfinite(found_r)]  # a sample may miss a side, or every change
    point = _share(total_gp.sum(axis=1)[None])[0]
    low, high = np.quantile(found_r, (0.025, 0.975)) if len(found_r) else (None, None)
    ends = {
        "low": low if low is None else float(low),
        "high": high if high is None else float(high),
    }
    return {"mean": float(point), **ends, "prompts": len(number), "resamples": len(found_r)}


def _share(total_rg: np.ndarray) -> np.ndarray:
    with np.errstate(divide="ignore", invalid="ignore"):
        target_r = total_rg[:, 0] / total_rg[:, 1]
        other_r = total_rg[:, 2] / total_rg[:, 3]
        return target_r / (target_r + other_r)


def _set_summary(names: Sequence[str], before_b: np.ndarray, after_b: np.ndarray) -> dict[str, Any]:
    change_b = after_b - before_b
    deviation = float(before_b.std())
    return {
        "responses": len(names),
        "prompts": len(set(names)),
        "before": mean_interval(_per_prompt(names, before_b)),
        "after": mean_interval(_per_prompt(names, after_b)),
        "change": mean_interval(_per_prompt(names, change_b)),
        "absolute_change": mean_interval(_per_prompt(names, np.abs(change_b))),
        "standard_deviation_before": deviation,
        "unchanged": float((change_b == 0).mean()),
        "scores": {"before": before_b.tolist(), "after": after_b.tolist()},
    }


def _per_prompt(names: Sequence[str], values_b: np.ndarray) -> list[float]:
    groups: dict[str, list[float]] = {}
    for name, value in zip(names, values_b.tolist(), strict=True):
        groups.setdefault(name, []).append(value)
    return [float(np.mean(group)) for group in groups.values()]


def _active(scored: Scored, controls: Controls, place: Sequence[int]) -> dict[str, float]:
    """The share of the responses on which each changed feature is not 0."""
    share_n = (scored.z_bn[list(place)] != 0).mean(axis=0)
    return {str(i): float(share_n[scored.features.index(i)]) for i in controls.changed}


def _rows(answers, before_b, after_b, scored: Scored, controls: Controls) -> list[dict[str, Any]]:
    columns = zip(answers, before_b, after_b, scored.z_bn, strict=True)
    return [
        {
            "question": answer.prompt,
            "answer": answer.response,
            "type": answer.kind,
            "source": answer.source,
            "reward": float(before),
            "reward_steered": float(after),
            "activated_latents": [
                i for i in controls.changed if z_n[scored.features.index(i)] != 0
            ],
        }
        for answer, before, after, z_n in columns
    ]


def parse_targets(names: str) -> tuple[str, ...]:
    """Comma-separated types or sets."""
    return tuple(dict.fromkeys(name.strip() for name in names.split(",") if name.strip()))
