"""Report which guards fire on finished runs with the current thresholds.

    python -m benchmarks.guards_on_runs outputs/study/seed_*/* outputs/smollm2

The output is a line per run, then the number of runs on which each guard fired, by the last part of
the directory's name, which is the condition of the lab. For runs of the lab it includes the range
of the final gold reward of the runs on which the guard fired, and of the other runs.
"""

import argparse
import contextlib
import logging
from collections import defaultdict
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path

from benchmarks.lab_studies import refusing
from configs import base
from ppo.options import guard_config
from ppo.tracking.guards import GUARDS, Watch
from ppo.tracking.metrics_csv import read_metrics
from sarm_jax.io.errors import InputError
from sarm_jax.io.json_files import read_json
from sarm_jax.rewards.options import reward_config


def warnings_of(workdir: Path) -> list[dict]:
    """Returns the warnings of the guards on the rows of metrics.csv."""
    settings = read_json(workdir / "config.json")["reward"]
    summary = read_json(workdir / "summary.json")
    try:
        reward = reward_config({"penalty_cap": float("inf")} | settings)
        alphas = reward.alphas_sd(summary["score_std_at_start"])
    except ValueError as error:  # for example, the file of selected features was moved
        print(f"{workdir}: checked without its penalties ({error})")
        alphas = []
    watch = Watch(guard_config(base.get_config().guards), alphas)
    for row in read_metrics(workdir / "metrics.csv"):
        watch.check(row)
    return watch.warnings


def gold_of(workdir: Path) -> float | None:
    """Returns the final gold reward of a run of the lab, or None for other runs."""
    path = workdir / "result.json"
    if not path.exists():
        return None
    gold: float = read_json(path)["gold_final"]
    return gold


@contextlib.contextmanager
def logging_disabled() -> Iterator[None]:
    """Disables all logging while the context is open."""
    logging.disable()
    try:
        yield
    finally:
        logging.disable(logging.NOTSET)


def main() -> None:
    """Prints a line per run, and lines per condition."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("runs", nargs="+", type=Path)
    paths = parser.parse_args().runs
    with refusing(parser), logging_disabled():  # the guards log what is printed here
        print_runs(runs_among(paths))


def runs_among(paths: Sequence[Path]) -> list[Path]:
    """Returns the runs among folders; raises InputError if a path is no folder, or none is a run.

    Patterns such as seed_*/* also name folders that hold data and models.
    """
    for path in paths:
        if not path.exists():
            raise InputError(f"{path}: no such directory")
    runs = [path for path in paths if (path / "summary.json").exists()]
    if not runs:
        names = f"{paths[0]} and {len(paths) - 1} more" if len(paths) > 1 else str(paths[0])
        raise InputError(f"{names}: no run (no summary.json)")
    return runs


def print_runs(runs: Sequence[Path]) -> None:
    """Prints a line per run, then lines per condition."""
    # condition → guard → (fired, final gold) of each run
    fired: dict[str, dict[str, list[tuple[bool, float | None]]]]
    fired = defaultdict(lambda: defaultdict(list))
    for workdir in runs:
        warnings, gold = warnings_of(workdir), gold_of(workdir)
        text = ", ".join(f"{w['guard']} from {w['first_step']} on {w['steps']}" for w in warnings)
        print(f"{workdir}: {text or 'none'}" + (f"; gold {gold:.2f}" if gold is not None else ""))
        names = {warning["guard"] for warning in warnings}
        for guard in GUARDS:
            fired[workdir.name][guard.name].append((guard.name in names, gold))
    print_conditions(fired)


def print_conditions(fired: Mapping[str, Mapping[str, list[tuple[bool, float | None]]]]) -> None:
    """Prints on how many runs each guard fired, from condition → guard → (fired, gold) of runs."""
    for name, guards in fired.items():
        runs = len(next(iter(guards.values())))
        for guard, outcomes in guards.items():
            count = sum(hit for hit, _ in outcomes)
            if not count:
                continue
            golds = {
                hit: [g for h, g in outcomes if h is hit and g is not None] for hit in (True, False)
            }
            ranges = [
                f"gold {min(g):.2f} to {max(g):.2f} where it {verb}"
                for verb, g in (("fired", golds[True]), ("did not", golds[False]))
                if g
            ]
            print(f"{name}: {guard} on {count} of {runs} runs; {', '.join(ranges)}")
        if not any(hit for outcomes in guards.values() for hit, _ in outcomes):
            print(f"{name}: no guard on {runs} runs")


if __name__ == "__main__":
    main()
