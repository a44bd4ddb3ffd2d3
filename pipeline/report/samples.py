"""Responses before and after training, prompt by prompt, for the browser and the figures.

From an evaluation where there is one: the base policy's response and the trained one's, each with
its score explained. Otherwise from the run itself: its first and last evaluation on held-out
prompts, or, with nothing to compare with, what it sampled while it was trained.
"""

import dataclasses
import math
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from pipeline.report.evaluations import BASE, Evaluation
from pipeline.report.runs import Run

SHOWN_TERMS = 8  # of a score; the others are added to the rest


@dataclasses.dataclass(frozen=True)
class Pair:
    """A prompt with the response of `run` and, if there is one, that from before training.

    A response is {text, score, terms, rest, penalties, length, ended}; `terms` are
    [feature, z, w, z·w], or None where nothing explains the score. `origin` says what they are.
    """

    run: str
    origin: str
    prompt: str
    before: Mapping[str, Any] | None
    after: Mapping[str, Any]


def pairs_of(runs: Sequence[Run], evaluations: Sequence[Evaluation]) -> list[Pair]:
    """Everything there is to show, run after run."""
    found = [pair for evaluation in evaluations for pair in _evaluated(evaluation, evaluations)]
    known = {pair.run for pair in found}
    own = {evaluation.folder.resolve() for evaluation in evaluations if evaluation.responses}
    for run in runs:
        if run.name not in known and run.folder.resolve() not in own:
            found += _held_out(run) or _sampled(run)
    return found


def browser_rows(pairs: Sequence[Pair], most: int) -> list[dict[str, Any]]:
    """JSON-ready rows for the page, at most `most` per run, evenly taken; 0: all."""
    rows = []
    for run in dict.fromkeys(pair.run for pair in pairs):
        own = [pair for pair in pairs if pair.run == run]
        count = min(most, len(own)) if most else len(own)
        for place in np.linspace(0, len(own) - 1, count).round().astype(int).tolist():
            rows.append(_finite(dataclasses.asdict(own[place])))
    return rows


def _evaluated(evaluation: Evaluation, evaluations: Sequence[Evaluation]) -> list[Pair]:
    """Pairs of an evaluation; a policy is called by its own name where that is clear."""
    alone = sum(bool(e.responses) for e in evaluations) == 1
    pairs = []
    policies = dict.fromkeys(name for row in evaluation.responses for name in row["responses"])
    for policy in policies:
        if policy == BASE and len(policies) > 1:
            continue
        clear = alone or policy == evaluation.name
        run = policy if clear else f"{evaluation.name}: {policy}"
        for row in evaluation.responses:
            found = row["responses"]
            if policy in found:
                before = found.get(BASE) if policy != BASE else None
                before = before and _explained(before)
                after = _explained(found[policy])
                pairs.append(Pair(run, "held-out prompt", row["prompt"], before, after))
    return pairs


def _explained(response: Mapping[str, Any]) -> dict[str, Any]:
    """The response of an evaluation; the terms that are not shown go into the rest."""
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
        "penalties": response.get("penalties") or {},
        "length": response.get("length"),
        "ended": response.get("ended"),
    }


def _held_out(run: Run) -> list[Pair]:
    """The run's first and last evaluation, prompt by prompt."""
    steps = sorted({row["step"] for row in run.held_out})
    if len(steps) < 2:
        return []
    first, last = ([r for r in run.held_out if r["step"] == at] for at in (steps[0], steps[-1]))
    origin = f"held-out prompt, before training and after {steps[-1]} steps"
    return [
        Pair(run.name, origin, a["prompt"], _recorded(b), _recorded(a))
        for b, a in zip(first, last, strict=False)
        if a["prompt"] == b["prompt"]
    ]


def _sampled(run: Run) -> list[Pair]:
    return [
        Pair(run.name, f"sampled at step {r['step']}", r["prompt"], None, _recorded(r))
        for r in run.samples
    ]


def _recorded(row: Mapping[str, Any]) -> dict[str, Any]:
    """A row that a run wrote: no latents, so nothing explains the score."""
    return {
        "text": row["response"],
        "score": row["rm_score"],
        "terms": None,
        "rest": None,
        "penalties": row["penalties"],
        "length": None,
        "ended": row.get("ended"),
    }


def _finite(value: Any) -> Any:
    """The same with None in place of what JSON cannot say."""
    if isinstance(value, dict):
        return {str(name): _finite(item) for name, item in value.items()}
    if isinstance(value, (list, tuple)):
        return [_finite(item) for item in value]
    return None if isinstance(value, float) and not math.isfinite(value) else value
