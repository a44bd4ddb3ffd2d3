"""RM-Bench: is the right answer scored higher, whatever the style of the two?

Every prompt has a right and a wrong answer in three styles. W[i, j] is the share of prompts whose
right answer in style i scores higher than the wrong one in style j (a tie counts as wrong):

    easy      mean of W below the diagonal: the right answer has the richer style
    normal    mean of the diagonal: both have the same style
    hard      mean of W above the diagonal: the wrong answer has the richer style
    average   mean of the three

The overall result is the mean over the domains chat, code, math and safety. The result of a domain
is the mean over its rows; safety pools the rows of safety-refuse and safety-response.

Source: arXiv 2410.16184 and its evaluation code (scripts/utils.py), which needs rows of all four
domains. If some domains have no rows, the overall result is the mean over the others, and
`missing_domains` names them. Rows of other domains count only if there are no rows of these four.

Additions: results for the two halves of safety, intervals over prompts, the paired change under
controls, and `prefers_detail`. The last is the share of comparisons in which the detailed version
of an answer scores higher than its concise version, whether the answer is right or wrong: it
measures the preference for length itself.
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
AREAS = ("chat", "code", "math", "safety")  # the domains of the overall result


def evaluate_rm_bench(
    model: RewardModel, rows: Sequence[StyledRow], controls: Controls
) -> dict[str, Any]:
    """Returns the content of rm_bench.json: every variant's results, by domain and overall."""
    texts = [(row.prompt, answer) for row in rows for answer in (*row.chosen, *row.rejected)]
    prompts, responses = zip(*texts, strict=True)
    scored = score_variants(model, prompts, responses, controls=controls)
    domains = [row.domain for row in rows]
    values = {
        name: row_values(score_b.reshape(len(rows), 2, len(STYLES)))
        for name, score_b in scored.variants.items()
    }
    change = {
        name: {measure: variant[measure] - values[PLAIN][measure] for measure in MEASURES}
        for name, variant in values.items()
        if name != PLAIN
    }
    return {
        "rows": len(rows),
        "styles": list(STYLES),
        "missing_domains": [area for area in AREAS if area not in map(area_of, domains)],
        "variants": {name: _summary(variant, domains) for name, variant in values.items()},
        "change": {name: _summary(variant, domains) for name, variant in change.items()},
    }


def row_values(score_nst: np.ndarray) -> dict[str, np.ndarray]:
    """Returns the results of each prompt.

    Args:
        score_nst: scores `[N, side, style]`, side 0 being the right answer and 1 the wrong one.

    Returns:
        `matrix` `[N, 3, 3]` and every measure `[N]`, by name.
    """
    chosen_ns, rejected_ns = score_nst[:, 0], score_nst[:, 1]
    wins_nij = (chosen_ns[:, :, None] > rejected_ns[:, None, :]).astype(np.float64)
    i, j = np.indices((len(STYLES), len(STYLES)))
    results = {
        "easy": wins_nij[:, i > j].mean(axis=1),
        "normal": wins_nij[:, i == j].mean(axis=1),
        "hard": wins_nij[:, i < j].mean(axis=1),
    }
    results["average"] = np.mean([results[level] for level in LEVELS[:3]], axis=0)
    longer_nst = score_nst[:, :, 1:] > score_nst[:, :, :1]
    results["prefers_detail"] = longer_nst.mean(axis=(1, 2))
    return results | {"matrix": wins_nij}


def area_of(domain: str) -> str:
    """Returns the domain of the overall result that a row's domain belongs to, or the row's own."""
    return next((area for area in AREAS if domain.startswith(area)), domain)


def domain_weights(domains: Sequence[str]) -> dict[str, float]:
    """Returns the weight of each domain in the overall result.

    The domains of the overall result have equal weights, and so have the rows within each of them.

    Args:
        domains: the domain of every row.
    """
    areas = Counter(map(area_of, domains))
    counted = [area for area in areas if area in AREAS] or list(areas)
    return {
        name: count / areas[area_of(name)] / len(counted)
        for name, count in sorted(Counter(domains).items())
        if area_of(name) in counted
    }


def _summary(results: Mapping[str, np.ndarray], domains: Sequence[str]) -> dict[str, Any]:
    """Summarises the results of all prompts by domain and overall; `domains` has one per prompt."""
    names = sorted(set(domains))
    rows_of = {name: np.flatnonzero([domain == name for domain in domains]) for name in names}

    def summarise(weights: Mapping[str, float]) -> dict[str, Any]:
        shares = list(weights.values())
        content: dict[str, Any] = {"rows": int(sum(len(rows_of[name]) for name in weights))}
        if "matrix" in results:
            means = [results["matrix"][rows_of[name]].mean(axis=0) for name in weights]
            content["matrix"] = np.tensordot(shares, means, axes=1).tolist()
        for measure in MEASURES:
            groups = [results[measure][rows_of[name]] for name in weights]
            content[measure] = stratified_interval(groups, shares)
        return content

    by_domain = {name: summarise({name: 1.0}) for name in names}
    for area in sorted(set(map(area_of, names))):
        by_domain[area] = summarise(domain_weights([d for d in domains if area_of(d) == area]))
    overall = summarise(domain_weights(domains))
    return {"domains": dict(sorted(by_domain.items())), "overall": overall}
