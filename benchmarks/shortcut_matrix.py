"""Compare what penalising each shortcut does to the rate of every shortcut, over several studies.

    python -m benchmarks.shortcut_matrix outputs/told_*

Each directory holds a study of the lab with the same shortcuts and seeds, and another
`lab.told_shortcuts`. A row of the first table is a study. A cell has the share of the final
responses of `penalty` with a shortcut and, after the colon, its difference from `baseline` with the
same seed.

The second table shows whether a pool of samples predicts evasion. It has the gain in score of the
best sample with a told shortcut on which no detector fires over the best sample without one, beside
the share of such responses after training.

Means over seeds with 95 % intervals (Student's t).
"""

import argparse
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from benchmarks.lab_studies import recorded_options, refusing
from sarm_jax.io.errors import InputError
from sarm_jax.io.json_files import read_json
from sarm_jax.reporting.statistics import format_interval, mean_interval

CONDITION, COMPARED = "penalty", "baseline"


def told(folder: Path) -> str:
    """Returns the shortcuts that the method is told in a study, by the record of its first seed."""
    return next(iter(recorded_options(folder).values()))["lab"]["told_shortcuts"]


def by_seed(study: dict[str, Any], condition: str) -> dict[int, dict[str, Any]]:
    """Returns the last point of the curve of each seed."""
    return {run["seed"]: run["curve"][-1] for run in study["conditions"].get(condition, ())}


def rates_of(studies: Sequence[tuple[str, dict[str, Any]]]) -> list[str]:
    """Returns the names of the rates, one for each shortcut, which all studies have to share."""
    rates: list[str] = []
    for name, study in studies:
        points = by_seed(study, CONDITION)
        own = [rate for rate in next(iter(points.values()), {}) if rate.startswith("rate_")]
        if not own or own != (rates or own):
            raise InputError(
                f"the study told of {name}: {CONDITION} has {', '.join(own) or 'no rate'}, "
                f"expected {', '.join(rates) or 'a rate for each of several shortcuts'}"
            )
        rates = own
    return rates


def changes(study: dict[str, Any], rates: Sequence[str]) -> list[str]:
    """Returns a cell for each rate: that of the penalty, and its difference from the baseline.

    Only seeds with a run in both conditions are used.
    """
    penalty, baseline = (by_seed(study, name) for name in (CONDITION, COMPARED))
    seeds = [seed for seed in penalty if seed in baseline]
    if not seeds:
        return ["–"] * len(rates)
    cells = []
    for rate in rates:
        mean = mean_interval([penalty[seed][rate] for seed in seeds])["mean"]
        difference = [penalty[seed][rate] - baseline[seed][rate] for seed in seeds]
        cells.append(f"{mean:.2f}: {format_interval(mean_interval(difference), '+.2f')}")
    return cells


def main() -> None:
    """Prints both tables of the studies in the directories that are named."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("studies", type=Path, nargs="+")
    folders = parser.parse_args().studies
    with refusing(parser):
        studies = [(told(folder), read_json(folder / "lab.json")) for folder in folders]
        rates = rates_of(studies)
    titles = [rate.removeprefix("rate_") for rate in rates]
    print(f"| told | seeds | final gold | {' | '.join(titles)} |")
    print("|---" * (len(rates) + 3) + "|")
    for name, study in studies:
        runs = study["conditions"][CONDITION]
        gold = format_interval(mean_interval([run["gold_final"] for run in runs]))
        print(f"| {name} | {len(runs)} | {gold} | {' | '.join(changes(study, rates))} |")
    print("\n| told | seed | evading gain in the pool, sd | final responses with it, undetected |")
    print("|---|---|---|---|")
    for name, study in studies:
        for seed, point in by_seed(study, CONDITION).items():
            gain = study["evading_gain"].get(str(seed))
            shown = "no pool, or none in it" if gain is None else f"{gain:+.2f}"
            print(f"| {name} | {seed} | {shown} | {point['told_undetected']:.3f} |")


if __name__ == "__main__":
    main()
