"""Responses before and after training, prompt by prompt, for the browser and the figures.

If there is an evaluation, they come from it: the responses of the base and the trained policy, each
with an explanation of its score. Otherwise they come from the run itself: from its first and last
evaluation on held-out prompts or, without a comparison, from the responses sampled in training.
"""

import dataclasses
import math
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from pipeline.report.evaluations import BASE, Evaluation
from pipeline.report.runs import Run
from sarm_jax.models.conversation import Prompt, to_json

SHOWN_TERMS = 8  # terms of a score that are shown; the others are added to the rest


@dataclasses.dataclass(frozen=True)
class Pair:
    """A prompt with the response of `run` and, if it exists, a response from before training.

    A response is {text, score, terms, rest, penalties, length, ended}; `terms` are
    [feature, z, w, z·w], or None if the score has no explanation. `outside` is there if parts of
    the score are outside the features: {part: its contribution}. `origin` describes the prompt.
    """

    run: str
    origin: str
    prompt: Prompt
    before: Mapping[str, Any] | None
    after: Mapping[str, Any]


def pairs_of(runs: Sequence[Run], evaluations: Sequence[Evaluation]) -> list[Pair]:
    """Returns all pairs, run after run; an evaluation takes precedence over the run's own data."""
    pairs = [pair for evaluation in evaluations for pair in _evaluated(evaluation, evaluations)]
    evaluated_runs = {pair.run for pair in pairs}
    evaluated_folders = {e.folder.resolve() for e in evaluations if e.responses}
    for run in runs:
        if run.name not in evaluated_runs and run.folder.resolve() not in evaluated_folders:
            pairs += _held_out(run) or _sampled(run)
    return pairs


def browser_rows(pairs: Sequence[Pair], max_rows: int) -> list[dict[str, Any]]:
    """Returns JSON-ready rows for the page.

    Args:
        pairs: the pairs of all runs.
        max_rows: rows per run, evenly spaced among its pairs; 0: all.
    """
    rows = []
    for run in dict.fromkeys(pair.run for pair in pairs):
        own = [pair for pair in pairs if pair.run == run]
        count = min(max_rows, len(own)) if max_rows else len(own)
        for index in np.linspace(0, len(own) - 1, count).round().astype(int).tolist():
            row = dataclasses.asdict(own[index]) | {"prompt": to_json(own[index].prompt)}
            rows.append(_without_nan(row))
    return rows


def features_of(rows: Sequence[Mapping[str, Any]]) -> list[int]:
    """Returns the features that rows of the page show, as penalties or as terms of a score."""
    sides = [side for row in rows for side in (row["before"], row["after"]) if side]
    penalised = (i for side in sides for i in side["penalties"] if i.isdecimal())
    terms = (term[0] for side in sides for term in side["terms"] or ())
    return list(dict.fromkeys([*map(int, penalised), *(i for i in terms if isinstance(i, int))]))


def _evaluated(evaluation: Evaluation, evaluations: Sequence[Evaluation]) -> list[Pair]:
    """Returns the pairs of an evaluation.

    The name of a policy is preceded by the name of the evaluation if it would be ambiguous.
    """
    is_only_one = sum(bool(e.responses) for e in evaluations) == 1
    pairs = []
    policies = dict.fromkeys(name for row in evaluation.responses for name in row["responses"])
    for policy in policies:
        if policy == BASE and len(policies) > 1:
            continue
        is_clear = is_only_one or policy == evaluation.name
        run = policy if is_clear else f"{evaluation.name}: {policy}"
        for row in evaluation.responses:
            responses = row["responses"]
            if policy not in responses:
                continue
            before = responses.get(BASE) if policy != BASE else None
            pair = Pair(
                run=run,
                origin="held-out prompt",
                prompt=row["prompt"],
                before=before and _explained(before),
                after=_explained(responses[policy]),
            )
            pairs.append(pair)
    return pairs


def _explained(response: Mapping[str, Any]) -> dict[str, Any]:
    """Returns a response of an evaluation; terms that are not shown are added to the rest."""
    terms, rest = response.get("terms"), response.get("rest", 0.0)
    if terms is not None:
        terms = sorted(terms, key=lambda term: -abs(term[3]))
        terms, others = terms[:SHOWN_TERMS], terms[SHOWN_TERMS:]
        rest = math.fsum([rest, *(term[3] for term in others)])
    return {
        "text": response["response"],
        "score": response["score"],
        "terms": terms,
        "rest": rest,
        **({"outside": response["outside"]} if response.get("outside") else {}),
        "penalties": response.get("penalties") or {},
        "length": response.get("length"),
        "ended": response.get("ended"),
    }


def _held_out(run: Run) -> list[Pair]:
    """Pairs the run's first evaluation with its last one, prompt by prompt."""
    steps = sorted({row["step"] for row in run.held_out})
    if len(steps) < 2:
        return []
    first = [row for row in run.held_out if row["step"] == steps[0]]
    last = [row for row in run.held_out if row["step"] == steps[-1]]
    return [
        Pair(
            run=run.name,
            origin=f"held-out prompt, before training and after {steps[-1]} steps",
            prompt=after["prompt"],
            before=_recorded(before),
            after=_recorded(after),
        )
        for before, after in zip(first, last, strict=False)
        if after["prompt"] == before["prompt"]
    ]


def _sampled(run: Run) -> list[Pair]:
    """Returns the responses that were sampled in training, without a comparison."""
    return [
        Pair(
            run=run.name,
            origin=f"sampled at step {row['step']}",
            prompt=row["prompt"],
            before=None,
            after=_recorded(row),
        )
        for row in run.samples
    ]


def _recorded(row: Mapping[str, Any]) -> dict[str, Any]:
    """Returns a response that a run recorded; it has no latents that explain its score."""
    return {
        "text": row["response"],
        "score": row["rm_score"],
        "terms": None,
        "rest": None,
        "penalties": row["penalties"],
        "length": None,
        "ended": row.get("ended"),
    }


def _without_nan(value: Any) -> Any:
    """Replaces numbers that JSON does not have, NaN and infinities, by None."""
    if isinstance(value, dict):
        return {str(name): _without_nan(item) for name, item in value.items()}
    if isinstance(value, (list, tuple)):
        return [_without_nan(item) for item in value]
    return None if isinstance(value, float) and not math.isfinite(value) else value
