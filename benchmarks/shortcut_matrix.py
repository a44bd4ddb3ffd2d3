"""Compare what penalising each shortcut does to the rate of every shortcut, over several studies.

    python -m benchmarks.shortcut_matrix outputs/told_*

Each directory holds a study of the lab with the same shortcuts and seeds, and another
`lab.told_shortcuts`. A row of the first table is a study: the shares of the final responses of
`penalty` with each shortcut, minus those of `baseline` with the same seed. The second table asks
whether a pool of samples predicts evasion: the largest gain of reward by a sample with a told
shortcut on which no detector fires, over the best sample without it, beside the share of such
responses that training leads to.

Means over seeds with 95 % intervals (Student's t).
"""

import argparse
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from sarm_jax.io.json_files import read_json
from sarm_jax.reporting.statistics import format_interval, mean_interval

CONDITION, COMPARED = "penalty", "baseline"


def told(folder: Path) -> str:
    """Returns the shortcuts that the method is told in a study."""
    config = read_json(next(folder.glob(f"seed_*/{CONDITION}/config.json")))
    return config["lab"]["told_shortcuts"]


def by_seed(study: dict[str, Any], condition: str) -> dict[int, dict[str, Any]]:
    """Returns the last point of the curve of each seed."""
    return {run["seed"]: run["curve"][-1] for run in study["conditions"][condition]}


def changes(study: dict[str, Any], rates: Sequence[str]) -> list[str]:
    """Returns a cell for each rate: that of the penalty, and its difference from the baseline."""
    penalty, baseline = (by_seed(study, name) for name in (CONDITION, COMPARED))
    cells = []
    for rate in rates:
        mean = mean_interval([point[rate] for point in penalty.values()])["mean"]
        difference = [penalty[seed][rate] - baseline[seed][rate] for seed in penalty]
        cells.append(f"{mean:.2f}: {format_interval(mean_interval(difference), '+.2f')}")
    return cells


def main() -> None:
    """Prints both tables of the studies in the directories that are named."""
    parser = argparse.ArgumentParser(description="Each shortcut penalised, every shortcut's rate.")
    parser.add_argument("studies", type=Path, nargs="+")
    folders = parser.parse_args().studies
    studies = {told(folder): read_json(folder / "lab.json") for folder in folders}
    first = next(iter(studies.values()))["conditions"][CONDITION][0]["curve"]
    rates = [name for name in first[0] if name.startswith("rate_")]
    print("| told | final gold | " + " | ".join(n.removeprefix("rate_") for n in rates) + " |")
    print("|---" * (len(rates) + 2) + "|")
    for name, study in studies.items():
        gold = mean_interval([run["gold_final"] for run in study["conditions"][CONDITION]])
        print(f"| {name} | {format_interval(gold)} | " + " | ".join(changes(study, rates)) + " |")
    print("\n| told | seed | evading gain in the pool, sd | final responses with it, undetected |")
    print("|---|---|---|---|")
    for name, study in studies.items():
        undetected = by_seed(study, CONDITION)
        for seed, gain in study["evading_gain"].items():
            shown = "none in the pool" if gain is None else f"{gain:+.2f}"
            print(f"| {name} | {seed} | {shown} | {undetected[int(seed)]['told_undetected']:.3f} |")


if __name__ == "__main__":
    main()
