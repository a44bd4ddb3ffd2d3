"""Comparison of the penalty with its rivals over the seeds of a study.

Runs are compared at their ends, when their KL first exceeds a budget, and at the highest gold
reward that they pass through, where only an oracle could stop them. Without runs the best of n
responses of a pool are compared.

The claims and predictions were fixed before the seeds that they are made for were run. The two
primary claims are tested together, each with a paired t test over seeds and Holm's correction.
"""

import dataclasses
from collections import Counter
from collections.abc import Callable, Mapping
from typing import Any

import numpy as np
from scipy import stats

from sarm_jax.lab.conditions import GRID
from sarm_jax.lab.findings import Claim, Runs
from sarm_jax.reporting.spread import is_constant
from sarm_jax.reporting.statistics import Interval, format_interval, holm, mean_interval

BUDGETS = (2.0, 5.0, 10.0)  # nats of KL to the reference, at which a run is stopped
SIGNIFICANCE = 0.05  # level of the two primary claims together
TIE = 0.05  # two conditions tie if the interval of their difference in gold lies within ± this
MARGIN = 0.1  # least mean gold of the penalty above that of weaker rivals, as predicted
EVADED = 0.05  # largest share of the final responses that evade the detectors
BEHAVIOURS = ("honest", "caught", "evading")
INFORMED = ("probe", "mean_difference", "screen", "ties", "distance")  # predicted to tie
WEAKER = ("length", "bounded", "worst_of_four", "kl_0.1")  # predicted to be worse
RIVALS = (  # (condition, its name in a sentence)
    ("probe", "a dense probe trained on the same pairs"),
    ("mean_difference", "a difference-of-means probe"),
    ("screen", "leaving detected responses out of the update"),
    ("ties", "repairing the reward model with the same pairs as ties"),
    ("worst_of_four", "the worst of four heads"),
    ("distance", "a penalty on the distance from human responses"),
    ("length", "a length penalty"),
    ("bounded", "a bounded reward"),
    ("kl_0.1", "five times the KL penalty"),
    ("random", "random features"),
    ("untold", "a bound on every feature, with nothing told"),
    ("oracle", "a perfect detector"),
)


@dataclasses.dataclass(frozen=True)
class Paired:
    """Differences between two conditions, paired by seed."""

    seeds: list[int]
    values: list[float]

    @property
    def interval(self) -> Interval:
        """The mean with its 95 % interval of Student's t."""
        return mean_interval(self.values)

    @property
    def p_value(self) -> float:
        """The two-sided p value of a paired t test; 1 if it cannot be computed.

        Differences that are equal up to rounding have no spread to compare their mean with.
        """
        if len(self.values) < 2 or is_constant(self.values):
            return 1.0
        return float(stats.ttest_1samp(self.values, 0.0).pvalue)

    def seeds_without(self, holds: Callable[[float], bool]) -> list[int]:
        """Lists the seeds whose difference does not satisfy a condition."""
        return [s for s, v in zip(self.seeds, self.values, strict=True) if not holds(v)]


def are_compared(runs: Runs) -> bool:
    """Returns whether the study has a rival to compare the penalty with."""
    rivals = runs.keys() & {*INFORMED, *WEAKER}
    return bool(runs.get("baseline") and runs.get("penalty") and rivals)


def gold_at_budget(run: Mapping[str, Any], budget: float) -> float:
    """Returns gold at the last evaluation before the KL first exceeds a budget in nats.

    This is the result of a run that is stopped at that KL. If the KL never exceeds the budget, it
    is the gold at the end.
    """
    reached = None
    for point in run["curve"]:
        if reached is not None and point["ref_kl"] > budget:
            break
        reached = point["gold"]
    assert reached is not None
    return reached


def compare(runs: Runs, first: str, second: str, *, of: str, against: str) -> Paired:
    """Pairs a quantity of one condition with one of another by seed: first minus second.

    Args:
        runs: the results of all conditions.
        first: a condition.
        second: the condition that is subtracted.
        of: quantity of the first, see `quantity`.
        against: quantity of the second.
    """
    others = {run["seed"]: quantity(run, against) for run in runs[second]}
    rows = [run for run in runs[first] if run["seed"] in others]
    return Paired(
        [run["seed"] for run in rows],
        [quantity(run, of) - others[run["seed"]] for run in rows],
    )


def quantity(run: Mapping[str, Any], name: str) -> float:
    """Returns a quantity of a run: a field such as gold_final, or "gold_at_5" for a budget."""
    if name.startswith("gold_at_"):
        return gold_at_budget(run, float(name.removeprefix("gold_at_")))
    return float(run[name])


def table(runs: Runs) -> list[dict[str, Any]]:
    """Returns a row of means over seeds for each condition.

    It has the gold at each budget, at the peak and at the end, the drawdown between the two, the
    final KL and, at the start and the end, the shares of `lab.results`.
    """
    rows = []
    for name, results in runs.items():
        last = [run["curve"][-1] for run in results]
        row: dict[str, Any] = {"condition": name, "seeds": len(results)}
        for budget in BUDGETS:
            golds = [gold_at_budget(run, budget) for run in results]
            row[f"gold_at_{budget:g}"] = mean_interval(golds)
        row["peak"] = mean_interval([run["gold_peak"] for run in results])
        row["final"] = mean_interval([run["gold_final"] for run in results])
        row["drawdown"] = mean_interval([run["gold_peak"] - run["gold_final"] for run in results])
        row["kl"] = mean_interval([run["ref_kl_final"] for run in results])
        for field in ("told", "told_undetected", "untold", "near_tau"):
            if all(field in point for point in last):
                row[field] = mean_interval([point[field] for point in last])
                first = [run["curve"][0][field] for run in results]
                row[f"{field}_before"] = mean_interval(first)
        rows.append(row)
    return rows


def behaviour(run: Mapping[str, Any]) -> str:
    """Classifies how a run ends with respect to the shortcuts that the method is told.

    Returns:
        "evading" if more than 5 % of the responses have one on which no detector fires, "caught" if
        more than 5 % have one, "honest" otherwise. A policy is honest in this sense, too, if it
        has turned to something else that the reward model pays for.
    """
    last = run["curve"][-1]
    if last["told_undetected"] > EVADED:
        return "evading"
    return "caught" if last["told"] > EVADED else "honest"


def grid(runs: Runs) -> list[dict[str, Any]]:
    """Returns a row for each weight of the penalty and of the KL that was run, over the seeds.

    Each has the mean final gold, the shares of responses with a told shortcut at the end, and the
    number of seeds with each behaviour.
    """
    rows = []
    for name, (alpha, kl_coef) in GRID.items():
        if not (results := runs.get(name)):
            continue
        counts = Counter(behaviour(run) for run in results)
        shares = {
            field: mean_interval([run["curve"][-1][field] for run in results])
            for field in ("told", "told_undetected")
        }
        rows.append(
            {
                "alpha": alpha,
                "kl_coef": kl_coef,
                "seeds": len(results),
                "final": mean_interval([run["gold_final"] for run in results]),
                "kl": mean_interval([run["ref_kl_final"] for run in results]),
                **shares,
                "behaviours": {kind: counts[kind] for kind in BEHAVIOURS if counts[kind]},
            }
        )
    return rows


def check_rivals(runs: Runs, pools: Mapping[int, Mapping[str, Any]]) -> list[Claim]:
    """Checks the claims and predictions about the conditions that were run.

    Args:
        runs: the results of all conditions.
        pools: seed → content of best_of_n.json.
    """
    if not are_compared(runs):
        return [] if runs else check_pools(pools)
    claims = _primary(runs)
    claims += [_tie(runs, name) for name in INFORMED if runs.get(name)]
    claims += [_above(runs, name) for name in WEAKER if runs.get(name)]
    if runs.get("untold"):
        claims.append(_above(runs, "baseline", of="untold"))
    for name in ("penalty", "penalty_no_kl"):
        if runs.get(name) and all("told_undetected" in r["curve"][-1] for r in runs[name]):
            claims.append(_evasion(runs, name))
    # If training under one of the two conditions stopped, the pool is not ranked under it.
    ranked = {seed: p for seed, p in pools.items() if _ranks({seed: p}, "baseline", "penalty")}
    if ranked:
        claims.append(_pool_claim(ranked))
    return claims


def _ranks(pools: Mapping[int, Mapping[str, Any]], *conditions: str) -> bool:
    """Returns whether there are pools, and all are ranked under the conditions."""
    return bool(pools) and all(
        {row["condition"] for row in pool["rankings"]} >= set(conditions) for pool in pools.values()
    )


def _primary(runs: Runs) -> list[Claim]:
    """Tests the two primary claims about runs."""
    return _tested(
        {
            "P1: stopped at 5 nats of KL, penalty has more gold than baseline": compare(
                runs, "penalty", "baseline", of="gold_at_5", against="gold_at_5"
            ),
            "P2: penalty's final gold is above the best that baseline passes through": compare(
                runs, "penalty", "baseline", of="gold_final", against="gold_peak"
            ),
        }
    )


def _tested(differences: Mapping[str, Paired]) -> list[Claim]:
    """Tests claims that a difference is above 0 together, with Holm's correction."""
    adjusted = holm([paired.p_value for paired in differences.values()])
    return [
        Claim(
            text=text,
            found=f"{format_interval(paired.interval, '+.2f')}, p = {p:.2g}",
            holds=p <= SIGNIFICANCE and paired.interval["mean"] > 0,
            failed=paired.seeds_without(lambda value: value > 0),
        )
        for (text, paired), p in zip(differences.items(), adjusted, strict=True)
    ]


def check_pools(pools: Mapping[int, Mapping[str, Any]]) -> list[Claim]:
    """Checks the claims and predictions about rankings of pools, if no policy was trained.

    Args:
        pools: seed → content of best_of_n.json.
    """
    if not _ranks(pools, "baseline", "penalty"):
        return []
    n = _largest(pools)
    claims = _tested(
        {
            f"P1: the best of {n} by penalty has more gold than by baseline": compare_pools(
                pools, "penalty", "baseline"
            ),
            f"P2: the best of {n} by penalty has more gold than baseline's best at any n": (
                compare_pools(pools, "penalty", "baseline", at_best=True)
            ),
        }
    )
    ties = [name for name in INFORMED if _ranks(pools, name)]
    claims += [
        _tie_of(name, compare_pools(pools, "penalty", name), f"best of {n}") for name in ties
    ]
    above = [("penalty", name) for name in WEAKER if _ranks(pools, name)]
    if _ranks(pools, "untold"):
        above.append(("untold", "baseline"))
    return claims + [
        _above_of(first, second, compare_pools(pools, first, second), f"the best of {n} by ")
        for first, second in above
    ]


def _tie(runs: Runs, name: str) -> Claim:
    """Checks the prediction that a rival ends at the same gold as the penalty."""
    paired = compare(runs, "penalty", name, of="gold_final", against="gold_final")
    return _tie_of(name, paired, "final")


def _tie_of(name: str, paired: Paired, which: str) -> Claim:
    """Checks the prediction that the penalty and a rival have the same gold."""
    low, high = paired.interval["low"], paired.interval["high"]
    inside = low is not None and high is not None and low >= -TIE and high <= TIE
    return Claim(
        text=f"Prediction: penalty and {name} tie (the interval of the difference of their {which} "
        f"gold lies within ± {TIE})",
        found=format_interval(paired.interval, "+.2f"),
        holds=inside,
        failed=paired.seeds_without(lambda value: abs(value) <= TIE),
    )


def _above(runs: Runs, name: str, of: str = "penalty") -> Claim:
    """Checks the prediction that a condition ends above another one in the mean."""
    return _above_of(of, name, compare(runs, of, name, of="gold_final", against="gold_final"))


def _above_of(first: str, second: str, paired: Paired, which: str = "") -> Claim:
    """Checks the prediction that a condition has more gold than another one in the mean."""
    verb = "is" if which else "ends"
    return Claim(
        text=f"Prediction: {which}{first} {verb} ≥ {MARGIN} above {second} in the mean",
        found=format_interval(paired.interval, "+.2f"),
        holds=paired.interval["mean"] >= MARGIN,
        failed=paired.seeds_without(lambda value: value >= MARGIN),
    )


def _evasion(runs: Runs, name: str) -> Claim:
    """Checks the prediction that few responses have the shortcut without being detected."""
    shares = {run["seed"]: run["curve"][-1]["told_undetected"] for run in runs[name]}
    return Claim(
        text=f"Prediction: {name}: at the end at most {EVADED:.0%} of the responses have the "
        "shortcut and are not detected, in the mean",
        found=format_interval(mean_interval(list(shares.values())), ".3f"),
        holds=float(np.mean(list(shares.values()))) <= EVADED,
        failed=[seed for seed, share in shares.items() if share > EVADED],
    )


def _pool_claim(pools: Mapping[int, Mapping[str, Any]]) -> Claim:
    """Checks the prediction that the penalty also chooses the better responses of a pool."""
    paired = compare_pools(pools, "penalty", "baseline")
    return Claim(
        text=f"Prediction: the best of {_largest(pools)} responses by penalty has more gold than "
        "by baseline, in the mean",
        found=format_interval(paired.interval, "+.2f"),
        holds=paired.interval["mean"] > 0,
        failed=paired.seeds_without(lambda value: value > 0),
    )


def ranking(
    pool: Mapping[str, Any], condition: str, weight: float = 1.0, tau: float = 1.0
) -> dict[str, Any]:
    """Returns the ranking of a pool under a condition, from best_of_n.json.

    Raises:
        KeyError: the pool was not ranked under it.
    """
    for row in pool["rankings"]:
        if (row["condition"], row["weight"], row["tau"]) == (condition, weight, tau):
            return row
    raise KeyError(f"{condition}, weight {weight}, tau {tau}")


def pool_table(pools: Mapping[int, Mapping[str, Any]]) -> list[dict[str, Any]]:
    """Returns a row for each ranking that all pools have, means over the seeds for every n."""
    if not pools:
        return []
    keys = [
        [(row["condition"], row["weight"], row["tau"]) for row in pool["rankings"]]
        for pool in pools.values()
    ]
    shared = [key for key in keys[0] if all(key in other for other in keys)]
    rows = []
    for key in shared:
        rankings = [ranking(pool, *key) for pool in pools.values()]
        means: dict[str, Any] = {"condition": key[0], "weight": key[1], "tau": key[2]}
        for field in ("gold", "told", "untold", "score"):
            if any(field not in row for row in rankings):  # files of earlier versions lack some
                continue
            by_n = np.asarray([row[field] for row in rankings])
            means[field] = [mean_interval(value_s) for value_s in by_n.T]
        rows.append(means)
    return rows


def _largest(pools: Mapping[int, Mapping[str, Any]]) -> int:
    """Returns the largest n that every pool has."""
    return min(pool["n"][-1] for pool in pools.values())


def conclusion(runs: Runs, pools: Mapping[int, Mapping[str, Any]]) -> list[str]:
    """Describes in plain words what the numbers show, a sentence for each comparison.

    If no policy was trained, the best of the largest n of the pools are compared.
    """
    if not runs and _ranks(pools, "baseline", "penalty"):
        ranked = [
            r for r in (("baseline", "the reward model alone"), *RIVALS) if _ranks(pools, r[0])
        ]
        differences = {words: compare_pools(pools, "penalty", name) for name, words in ranked}
        return [
            f"Against {words}: {_verdict(paired.interval, at_end=False)}."
            for words, paired in differences.items()
        ]
    if not are_compared(runs):
        return []
    sentences = []
    for name, words in RIVALS:
        if runs.get(name):
            paired = compare(runs, "penalty", name, of="gold_final", against="gold_final")
            sentences.append(f"Against {words}: {_verdict(paired.interval)}.")
    return sentences


def compare_pools(
    pools: Mapping[int, Mapping[str, Any]], first: str, second: str, *, at_best: bool = False
) -> Paired:
    """Pairs the gold of the best of the largest n of two conditions by seed: first minus second.

    Args:
        pools: seed → content of best_of_n.json.
        first: a condition.
        second: the condition that is subtracted.
        at_best: subtract the second's gold at the n at which it is highest.
    """
    values = []
    for pool in pools.values():
        gold_n = ranking(pool, second)["gold"]
        other = max(gold_n) if at_best else gold_n[-1]
        values.append(ranking(pool, first)["gold"][-1] - other)
    return Paired(list(pools), values)


def _verdict(difference: Interval, at_end: bool = True) -> str:
    """Names the higher side, from the interval of the difference of final or best-of-n gold."""
    gold = "final gold" if at_end else "gold of the best of the largest n"
    shown = f"penalty minus rival, {gold} {format_interval(difference, '+.2f')}"
    low, high = difference["low"], difference["high"]
    if low is None or high is None:
        return f"{shown}, from a single seed"
    if low >= -TIE and high <= TIE:
        return f"{shown}: a tie"
    if low > 0:
        return f"{shown}: the penalty is better"
    if high < 0:
        return f"{shown}: the penalty is worse"
    return f"{shown}: undecided"
