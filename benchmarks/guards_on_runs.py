"""Which guards fire on runs that are there, with today's thresholds.

    python -m benchmarks.guards_on_runs outputs/study/seed_*/* outputs/smollm2

A line per run, then how often each guard fired by the last part of the directory's name (the lab's
condition), with the gold reward that runs of the lab ended with where it did and did not.
"""

import argparse
import json
import logging
from collections import defaultdict
from pathlib import Path

from ppo.options import reward_config
from ppo.tracking.guards import GUARDS, GuardConfig, Watch
from ppo.tracking.metrics_csv import read_metrics


def warnings_of(workdir: Path) -> list[dict]:
    """What the guards say of the rows of metrics.csv."""
    settings = json.loads((workdir / "config.json").read_text(encoding="utf-8"))["reward"]
    summary = json.loads((workdir / "summary.json").read_text(encoding="utf-8"))
    try:
        reward = reward_config({"penalty_cap": float("inf")} | settings)
        alphas = reward.alphas_sd(summary["score_std_at_start"])
    except ValueError as error:  # the file of selected features has moved
        print(f"{workdir}: without its penalties ({error})")
        alphas = []
    watch = Watch(GuardConfig(), alphas)
    for row in read_metrics(workdir / "metrics.csv"):
        watch(row)
    return watch.warnings


def gold_of(workdir: Path) -> float | None:
    """The gold reward that a run of the lab ended with."""
    path = workdir / "result.json"
    if not path.exists():
        return None
    return json.loads(path.read_text(encoding="utf-8"))["gold_final"]


def main() -> None:
    """Prints the lines and the table."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("runs", nargs="+", type=Path)
    args = parser.parse_args()
    logging.disable()
    fired: dict[str, dict[str, list]] = defaultdict(lambda: defaultdict(list))
    for workdir in args.runs:
        if not (workdir / "summary.json").exists():
            continue
        found, gold = warnings_of(workdir), gold_of(workdir)
        shown = ", ".join(f"{w['guard']} from {w['first_step']} on {w['steps']}" for w in found)
        print(f"{workdir}: {shown or 'none'}" + (f"; gold {gold:.2f}" if gold is not None else ""))
        names = {warning["guard"] for warning in found}
        for guard in GUARDS:
            fired[workdir.name][guard.name].append((guard.name in names, gold))
    for name, guards in fired.items():
        runs = len(next(iter(guards.values())))
        for guard, seen in guards.items():
            count = sum(hit for hit, _ in seen)
            if not count:
                continue
            golds = {
                hit: [g for h, g in seen if h is hit and g is not None] for hit in (True, False)
            }
            ranges = [
                f"gold {min(g):.2f} to {max(g):.2f} where it {verb}"
                for verb, g in (("fired", golds[True]), ("did not", golds[False]))
                if g
            ]
            print(f"{name}: {guard} on {count} of {runs} runs; {', '.join(ranges)}")
        if not any(hit for seen in guards.values() for hit, _ in seen):
            print(f"{name}: no guard on {runs} runs")


if __name__ == "__main__":
    main()
