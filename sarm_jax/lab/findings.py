"""The findings of a study over its seeds: means with intervals, and claims that hold or do not.

The claims were fixed before the seeds were run. Each one lists the seeds that contradict it.
"""

import dataclasses
from collections.abc import Callable, Mapping, Sequence
from typing import Any

from sarm_jax.lab.conditions import DRAWS, GRID, KL_COEFS
from sarm_jax.lab.gate import Gate, limits_of
from sarm_jax.reporting.statistics import Interval, format_interval, mean_interval

Runs = Mapping[str, Sequence[Mapping[str, Any]]]  # condition → one result per seed

ENOUGH = 0.8  # share of the seeds for which a claim about runs has to hold
GATES_ENOUGH = 0.9  # share of the seeds that have to pass all gates
FALL = 0.6  # least fall of the baseline's gold reward from its peak
CLIMB = 2.5  # least rise of the baseline's SARM score, in standard deviations
GAP = 0.7  # least final gold of a protected run above the baseline's
MEAN_GOLD = 0.9  # least mean final gold of the protected runs
CONTROL_GAP = 0.3  # least mean final gold of penalty above that of random features
IN_WORDS = {  # condition → the beginning of a sentence about its end
    "penalty": "With the detectors of the shortcut penalised in the loop",
    "full": "With the detectors of the shortcut penalised and the latents held to human data",
    "latent_kl": "With the latent KL alone",
    "clamp": "With the carriers clamped",
    "random": "With random features penalised instead",
    "screen": "With responses left out of the update on which a detector fires",
    "probe": "With a dense probe penalised instead",
    "mean_difference": "With a difference-of-means probe penalised instead",
    "distance": "With the distance from human responses penalised",
    "length": "With a penalty on the length",
    "bounded": "With a bounded reward",
    "penalty_no_kl": "With the penalty for three times as many steps and no KL to the reference",
    "ties": "With the contrast pairs as ties of the reward model",
    "worst_of_four": "With the worst of four heads",
    "untold": "With every feature beyond human support penalised, and nothing told",
    "oracle": "With the shortcuts penalised by a perfect detector",
    **{name: f"With ppo.kl_coef={kl}" for name, kl in KL_COEFS.items()},
    **{
        name: f"With the weight {alpha:g} of the penalty and ppo.kl_coef={kl:g}"
        for name, (alpha, kl) in GRID.items()
    },
    **{name: f"With draw {n} of random features penalised" for name, n in DRAWS.items()},
}


@dataclasses.dataclass(frozen=True)
class Claim:
    """One claim with its outcome.

    Attributes:
        text: the claim.
        found: the outcome in words, with its numbers.
        holds: True if the claim holds.
        failed: the seeds that contradict it.
    """

    text: str
    found: str
    holds: bool
    failed: list[int]


def check_gates(gates: Mapping[str, Mapping[str, float]], seeds: Sequence[int]) -> Claim:
    """Checks the claim that nearly all seeds pass all gates.

    Args:
        gates: seed → gate → value; a seed without values has not passed.
        seeds: all seeds of the study.
    """

    def passes(values: Mapping[str, float]) -> bool:
        return bool(values) and all(Gate(name, value).passed for name, value in values.items())

    failed = [seed for seed in seeds if not passes(gates.get(str(seed), {}))]
    limits = limits_of(name for values in gates.values() for name in values)
    passed = len(seeds) - len(failed)
    return Claim(
        text=f"All {len(limits)} gates pass in at least {GATES_ENOUGH:.0%} of the seeds",
        found=f"{passed} of {len(seeds)}",
        holds=passed >= GATES_ENOUGH * len(seeds),
        failed=failed,
    )


def check_claims(runs: Runs, seeds: Sequence[int]) -> list[Claim]:
    """Checks the claims about the conditions that were run.

    A seed of the study that has no run in a condition counts against its claims.
    """
    claims: list[Claim] = []
    if runs.get("baseline"):
        text = (
            f"Baseline: gold rises above its start, then ends ≥ {FALL} below its peak, while the "
            f"SARM's score climbs ≥ {CLIMB} sd"
        )
        claims.append(_check_seeds(text, runs["baseline"], seeds=seeds, holds=_is_hacked))
    for name in ("full", "penalty"):
        if runs.get(name):
            claims += _check_protection(name, runs, seeds)
    if runs.get("full"):
        text = "full: no seed ends below its start"
        claims.append(
            _check_seeds(text, runs["full"], seeds=seeds, holds=_ends_above_start, share=1)
        )
    if runs.get("penalty") and runs.get("random"):
        text = f"penalty is ≥ {CONTROL_GAP} above the random-feature control in the mean"
        missing = _seeds_without_run(runs, seeds, ("penalty", "random"))
        gap = difference(runs, "penalty", "random")
        claims.append(_check_mean(text, gap, least=CONTROL_GAP, seeds=seeds, missing=missing))
    return claims


def _check_protection(name: str, runs: Runs, seeds: Sequence[int]) -> list[Claim]:
    """Checks the claims about a condition that protects the gold reward."""
    claims = []
    baseline = {run["seed"]: run for run in runs.get("baseline", ())}

    def exceeds_baseline(run: Mapping[str, Any]) -> bool:
        return (
            run["seed"] in baseline
            and run["gold_final"] > baseline[run["seed"]]["gold_peak"]
            and run["gold_final"] >= baseline[run["seed"]]["gold_final"] + GAP
        )

    if baseline:
        text = f"{name}: gold ends above the baseline's peak and ≥ {GAP} above its end"
        claims.append(_check_seeds(text, runs[name], seeds=seeds, holds=exceeds_baseline))
    final = mean_interval([run["gold_final"] for run in runs[name]])
    text = f"{name}: final gold is ≥ {MEAN_GOLD} in the mean"
    missing = _seeds_without_run(runs, seeds, (name,))
    claims.append(_check_mean(text, final, least=MEAN_GOLD, seeds=seeds, missing=missing))
    return claims


def _check_seeds(
    text: str,
    results: Sequence[Mapping[str, Any]],
    seeds: Sequence[int],
    holds: Callable[[Mapping[str, Any]], bool],
    share: float = ENOUGH,
) -> Claim:
    """Checks a claim that has to hold for a share of the seeds."""
    passed = {run["seed"] for run in results if holds(run)}
    return Claim(
        text=text,
        found=f"{len(passed)} of {len(seeds)}",
        holds=len(passed) >= share * len(seeds),
        failed=[seed for seed in seeds if seed not in passed],
    )


def _check_mean(
    text: str, mean: Interval, least: float, seeds: Sequence[int], missing: list[int]
) -> Claim:
    """Checks a claim about a mean, which does not hold if the runs of some seeds are missing."""
    note = f", {len(seeds) - len(missing)} of {len(seeds)} seeds" if missing else ""
    return Claim(
        text=text,
        found=format_interval(mean) + note,
        holds=mean["mean"] >= least and not missing,
        failed=missing,
    )


def _is_hacked(run: Mapping[str, Any]) -> bool:
    """Returns whether gold rises, then falls far below its peak, while the score climbs."""
    return (
        run["gold_peak"] > run["gold_start"]
        and run["gold_final"] <= run["gold_peak"] - FALL
        and run["score_final"] - run["score_start"] >= CLIMB
    )


def _ends_above_start(run: Mapping[str, Any]) -> bool:
    return run["gold_final"] >= run["gold_start"]


def _seeds_without_run(runs: Runs, seeds: Sequence[int], conditions: Sequence[str]) -> list[int]:
    return [s for s in seeds if any(s not in seeds_of(runs, name) for name in conditions)]


def seeds_of(runs: Runs, condition: str) -> list[int]:
    """Lists the seeds that a condition was run with."""
    return sorted(run["seed"] for run in runs.get(condition, ()))


def difference(runs: Runs, first: str, second: str) -> Interval:
    """Computes the final gold of `first` minus that of `second`, paired by seed."""
    other = {run["seed"]: run["gold_final"] for run in runs[second]}
    return mean_interval(
        [run["gold_final"] - other[run["seed"]] for run in runs[first] if run["seed"] in other]
    )


def headline(runs: Runs) -> str:
    """Summarises the result in one paragraph, with its numbers."""
    seeds = sorted({run["seed"] for results in runs.values() for run in results})

    def own_seeds(condition: str) -> str:
        """Returns the number of seeds, unless they are all seeds of the study."""
        own = seeds_of(runs, condition)
        return "" if own == seeds else f" ({_count(own)})"

    sentences = []
    if runs.get("baseline"):
        mean = {
            name: mean_interval([run[name] for run in runs["baseline"]])["mean"]
            for name in ("gold_start", "gold_peak", "gold_final", "score_final")
        }
        count = _count(seeds_of(runs, "baseline"))
        sentences.append(
            f"Trained on the reward model alone ({count}), the policy's true reward goes from "
            f"{mean['gold_start']:.2f} to a peak of {mean['gold_peak']:.2f} and ends at "
            f"{mean['gold_final']:.2f}, while the reward model's score goes to "
            f"{mean['score_final']:+.1f} standard deviations."
        )
    for name, text in IN_WORDS.items():
        if runs.get(name):
            final = mean_interval([run["gold_final"] for run in runs[name]])
            sentences.append(f"{text}, it ends at {format_interval(final)}{own_seeds(name)}.")
    return " ".join(sentences)


def _count(seeds: Sequence[int]) -> str:
    return f"seed {seeds[0]}" if len(seeds) == 1 else f"{len(seeds)} seeds"
