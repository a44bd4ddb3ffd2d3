"""Compare penalties with stopping early, on the runs of a study of the lab.

    python -m benchmarks.early_stopping outputs/study

Two tables, a row per seed and their means with 95 % intervals (Student's t over seeds):

1. The penalty's final gold reward minus the baseline's best one. The best step is only known to an
   oracle that sees the gold reward of every evaluation and stops there.
2. The lead time of the guard `reference_kl` in the baseline: the PPO steps between its warning and
   the first evaluation at which gold is 0.1 below the peak it has reached. A negative lead time
   means that the warning came after the fall.
"""

import argparse
from pathlib import Path
from typing import Any

from benchmarks.lab_studies import begun_seeds, refusing
from sarm_jax.io.json_files import read_json
from sarm_jax.reporting.statistics import format_interval, mean_interval

FALL = 0.1  # of the gold reward, from its peak so far


def step_of_fall(curve: list[dict[str, float]]) -> int | None:
    """Returns the first evaluated step at which gold is `FALL` below its peak so far, or None."""
    peak = float("-inf")
    for point in curve:
        peak = max(peak, point["gold"])
        if point["gold"] <= peak - FALL:
            return int(point["step"])
    return None


def step_of_warning(summary: dict[str, Any], guard: str) -> int | None:
    """Returns the number of finished steps at a guard's first warning, or None."""
    steps = [w["first_step"] + 1 for w in summary["warnings"] if w["guard"] == guard]
    return min(steps, default=None)


def row_of(seed: Path) -> dict[str, float | int | None]:
    """Returns one seed's row of both tables."""
    baseline, penalty = (read_json(seed / name / "result.json") for name in ("baseline", "penalty"))
    fall = step_of_fall(baseline["curve"])
    warning = step_of_warning(read_json(seed / "baseline" / "summary.json"), "reference_kl")
    lead = None if fall is None or warning is None else fall - warning
    return {
        "best": baseline["gold_peak"],
        "best_step": baseline["peak_step"],
        "final": penalty["gold_final"],
        "difference": penalty["gold_final"] - baseline["gold_peak"],
        "fall": fall,
        "warning": warning,
        "lead": lead,
    }


def main() -> None:
    """Prints the tables of the study in the directory that is named."""
    parser = argparse.ArgumentParser(description="Penalties against stopping early.")
    parser.add_argument("study", type=Path)
    study = parser.parse_args().study
    with refusing(parser):
        rows = {seed: row_of(folder) for seed, folder in begun_seeds(study).items()}
    print("| seed | baseline's best gold | at step | penalty's final gold | difference |")
    print("|---|---|---|---|---|")
    for seed, row in rows.items():
        print(
            f"| {seed} | {row['best']:.3f} | {row['best_step']} | {row['final']:.3f} | "
            f"{row['difference']:+.3f} |"
        )
    difference = mean_interval([row["difference"] for row in rows.values()])
    print(f"\nmean {format_interval(difference, '.3f')}\n")
    print("| seed | reference_kl warns after step | gold 0.1 below its peak at step | lead |")
    print("|---|---|---|---|")
    for seed, row in rows.items():
        print(f"| {seed} | {row['warning']} | {row['fall']} | {row['lead']} |")
    leads = [row["lead"] for row in rows.values() if row["lead"] is not None]
    if leads:
        mean = format_interval(mean_interval(leads), ".3f")
        print(f"\nmean lead {mean} steps, over {len(leads)} of {len(rows)} seeds")


if __name__ == "__main__":
    main()
