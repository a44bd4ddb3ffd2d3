"""RM-Bench: is the right answer scored higher, whatever the style of the two?

Every prompt has a right and a wrong answer in three styles. W[i, j] is the share of prompts whose
right answer in style i scores higher than the wrong one in style j (a tie counts as wrong):

    easy    mean of W below the diagonal: the right answer has the richer style
    normal  mean of the diagonal:         the same style
    hard    mean of W above the diagonal: the wrong answer has the richer style
    average of the three; overall: mean over the domains chat, code, math and safety, each the
    mean over all of its rows: those of safety-refuse and safety-response are pooled

Source: arXiv 2410.16184 and its evaluation code (scripts/utils.py), which needs rows of all four
domains. Without some of them the overall is the mean over the others, and `missing_domains` names
those that have no rows. Rows of other domains do not count, unless there are no others.

Beyond it: the two halves of safety by themselves, intervals over prompts, the paired change under
controls, and `prefers_detail`, the share of comparisons in which the detailed version of an answer
beats the concise version of the same answer. Right and wrong play no part in it: it is the taste
for length itself.
"""

from collections import Counter
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from sarm_jax.evaluation.benchmark_files import STYLES, StyledRow
from sarm_jax.evaluation.controls import PLAIN, Controls, score_variants
from sarm_jax.models.reward_model import RewardModel
from sarm_jax.reporting.statistics import stratified_interval

LEVELS = ("easy", "normal", "hard", "average")
MEASURES = (*LEVELS, "prefers_detail")
AREAS = ("chat", "code", "math", "safety")  # the domains of the overall


def evaluate_rm_bench(
    model: RewardModel, rows: Sequence[StyledRow], controls: Controls
) -> dict[str, Any]:
    """The content of rm_bench.json: for every variant, per domain and overall."""
    texts = [(row.prompt, answer) for row in rows for answer in (*row.chosen, *row.rejected)]
    prompts, responses = zip(*texts, strict=True)
    scored = score_variants(model, prompts, responses, controls)
    domains = [row.domain for row in rows]
    values = {
        name: row_values(score_b.reshape(len(rows), 2, len(STYLES)))
        for name, score_b in scored.variants.items()
    }
    change = {
        name: {measure: found[measure] - values[PLAIN][measure] for measure in MEASURES}
        for name, found in values.items()
        if name != PLAIN
    }
    return {
        "rows": len(rows),
        "styles": list(STYLES),
        "missing_domains": [area for area in AREAS if area not in map(area_of, domains)],
        "variants": {name: _summary(found, domains) for name, found in values.items()},
        "change": {name: _summary(found, domains) for name, found in change.items()},
    }


def row_values(score_nst: np.ndarray) -> dict[str, np.ndarray]:
    """Per prompt, from scores `[N, side, style]` (side 0 right, 1 wrong): `matrix [N, 3, 3]`,
    and every measure `[N]`."""
    chosen_ns, rejected_ns = score_nst[:, 0], score_nst[:, 1]
    wins_nij = (chosen_ns[:, :, None] > rejected_ns[:, None, :]).astype(np.float64)
    i, j = np.indices((len(STYLES), len(STYLES)))
    found = {
        "easy": wins_nij[:, i > j].mean(axis=1),
        "normal": wins_nij[:, i == j].mean(axis=1),
        "hard": wins_nij[:, i < j].mean(axis=1),
    }
    found["average"] = np.mean([found[level] for level in LEVELS[:3]], axis=0)
    longer_nst = score_nst[:, :, 1:] > score_nst[:, :, :1]
    found["prefers_detail"] = longer_nst.mean(axis=(1, 2))
    return found | {"matrix": wins_nij}


def area_of(domain: str) -> str:
    """The domain of the overall that a row's domain belongs to, else the row's own."""
    return next((area for area in AREAS if domain.startswith(area)), domain)


def domain_weights(domains: Sequence[str]) -> dict[str, float]:
    """The weight of each row's domain in the overall, from the domains of all rows.

    The domains of the overall weigh the same; within one, every row does.
    """
    areas = Counter(map(area_of, domains))
    counted = [area for area in areas if area in AREAS] or list(areas)
    return {
        name: count / areas[area_of(name)] / len(counted)
        for name, count in sorted(Counter(domains).items())
        if area_of(name) in counted
    }


def _summary(found: Mapping[str, np.ndarray], domains: Sequence[str]) -> dict[str, Any]:
    names = sorted(set(domains))
    place = {name: np.flatnonzero([domain == name for domain in domains]) for name in names}

    def part(weights: Mapping[str, float]) -> dict[str, Any]:
        shares = list(weights.values())
        content: dict[str, Any] = {"rows": int(sum(len(place[name]) for name in weights))}
        if "matrix" in found:
            means = [found["matrix"][place[name]].mean(axis=0) for name in weights]
            content["matrix"] = np.tensordot(shares, means, axes=1).tolist()
        for measure in MEASURES:
            groups = [found[measure][place[name]] for name in weights]
            content[measure] = stratified_interval(groups, shares)
        return content

    parts = {name: part({name: 1.0}) for name in names}
    for area in sorted(set(map(area_of, names))):
        parts[area] = part(domain_weights([d for d in domains if area_of(d) == area]))
    return {"domains": dict(sorted(parts.items())), "overall": part(domain_weights(domains))}
